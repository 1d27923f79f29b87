"""An HTML page as tests read it."""

from html import parser

VOID = {'meta', 'link', 'img', 'br', 'hr', 'wbr'}


class Page(parser.HTMLParser):
  """Tags with their attributes, text by tag class, and nesting errors."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts, self.stack, self.rows = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.stack

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')
    if tag not in VOID:
      self.stack.append((tag, dict(attrs).get('class') or ''))

  def handle_endtag(self, tag):
    opened, _ = self.stack.pop()
    assert opened == tag, f'</{tag}> closes <{opened}>'

  def handle_data(self, data):
    self.texts.append((self.stack[-1] if self.stack else ('', ''), data))
    if any(tag in ('td', 'th') for tag, _ in self.stack):
      self.rows[-1][-1] += data

  def text(self, tag, name):
    return [
      ' '.join(data.split())
      for (at, kind), data in self.texts
      if at == tag and name in kind.split()
    ]

  @property
  def images(self):
    return [attrs for tag, attrs in self.tags if tag == 'img']
