"""The sound part of the commands that bad input is given to."""

TOKENIZER = '--config=tests/launch/tiny.py:tokenizer'
SCALING = '--config=tests/launch/tiny.py:scaling'
GENERATOR = '--config=tests/launch/tiny.py:generator'
WORKDIR = '--workdir={new}'
TRAIN = ('train', TOKENIZER, WORKDIR)
PHOTOS = '--config.data.source=auto', '--config.data.path='
TRAIN_GENERATOR = (
  'train', GENERATOR, WORKDIR, '--config.tokenizer={runs}/tokenizer',
)  # fmt: skip
SAMPLE = (
  'sample', '--workdir={runs}/generator', '--tokenizer={runs}/scaled',
  '--out={new}', '--num_samples=2',
)  # fmt: skip
EVALUATE = 'evaluate', '--workdir={runs}/tokenizer'
EVALUATE_GENERATOR = (
  'evaluate', '--workdir={runs}/generator', '--tokenizer={runs}/scaled',
)  # fmt: skip
