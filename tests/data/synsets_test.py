import pytest

from selfboottok_jax.data import synsets


def test_there_are_a_thousand_in_order():
  words = synsets.words()
  assert len(words) == 1000
  assert list(words) == sorted(words)
  assert all(map(synsets.is_synset, words))
  # Labels that are known everywhere.
  labels = {0: 'tench', 1: 'goldfish', 207: 'golden retriever', 388:
            'giant panda', 985: 'daisy', 999: 'toilet tissue'}  # fmt: skip
  for label, word in labels.items():
    assert list(words.values())[label][0] == word


def test_words_name_classes():
  names = tuple(synsets.words())
  assert synsets.find('tench', names) == [0]
  assert synsets.find('Tinca tinca', names) == [0]
  assert synsets.find('n01440764', names) == [0]
  assert synsets.find('no such thing', names) == []
  # The bird and the machine.
  assert synsets.find('crane', names) == [134, 517]
  shown = synsets.readable(names)
  assert len(set(shown)) == 1000
  assert synsets.find(shown[134], names) == [134]
  assert synsets.readable(('cat', 'n01440764')) == ('cat', 'tench')


@pytest.mark.parametrize(
  ('names', 'wanted'),
  [
    ((), []),
    (('cat', 'n01440764'), []),
    (('n99999999', 'n01440764'), ['1 of 2 classes are synsets that ILSVRC']),
    (('n99999999',), []),
    (tuple(synsets.words()), ["ImageNet's 1,000 synsets, labelled in their"]),
  ],
)
def test_notes(names, wanted):
  found = synsets.notes(names)
  assert len(found) == len(wanted)
  assert all(text in note for text, note in zip(wanted, found, strict=True))
