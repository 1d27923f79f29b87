import gzip
import json
import os
import pickle

import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import picture_set, shards
from tests.data import forms, trees


def keys(count, start=0):
  return [f'{i:04}' for i in range(start, start + count)]


def members(names, **others):
  """Pictures and, by ending, what a function makes of a key's index."""
  return [
    member
    for i, key in enumerate(names)
    for member in (
      (f'{key}.jpg', trees.png(i)),
      *((f'{key}.{ending}', make(i)) for ending, make in others.items()),
    )
  ]


def cls(i):
  return str(i % 3).encode()


def write(root, *names, count=4, **others):
  others = others or {'cls': cls}
  for number, name in enumerate(names):
    forms.write_tar(root / name, members(keys(count, count * number), **others))
  return root


def read(path):
  return shards.open_shards(str(path))


def all_labels(found):
  return {
    found.splits[split].names[i].rpartition('/')[2].split('.')[0]: label
    for split in picture_set.SPLITS
    for i, label in enumerate(found.splits[split].labels.tolist())
  }


def one(tmp_path, contents):
  return read(forms.write_tar(tmp_path / 'a.tar', contents))


def refusal(path):
  with pytest.raises(errors.DataError) as caught:
    read(path)
  assert '\n' not in str(caught.value)
  return str(caught.value)


# Paths.


@pytest.mark.parametrize(
  ('pattern', 'names'),
  [
    ('train-{000..002}.tar', ['000', '001', '002']),
    ('train-{000000..000001}.tar', ['000000', '000001']),
    ('train-{9..11}.tar', ['9', '10', '11']),
    ('train-{08..10..2}.tar', ['08', '10']),
    ('train-{2..0}.tar', ['2', '1', '0']),
    ('train-{b,a}.tar', ['b', 'a']),
    ('train-{a,b}{0..1}.tar', ['a0', 'a1', 'b0', 'b1']),
    ('train-7.tar,train-3.tar', ['7', '3']),
  ],
)
def test_braces_are_those_of_a_shell_and_keep_their_order(
  tmp_path, pattern, names
):
  write(tmp_path, *(f'train-{name}.tar' for name in names), count=2)
  path = f'{tmp_path}/{pattern}'.replace(',train', f',{tmp_path}/train')
  assert shards.matches(path)
  found = read(path)
  merged = sorted(
    (n for s in picture_set.SPLITS for n in found.splits[s].names),
    key=lambda name: int(name.split('/')[1].split('.')[0]),
  )
  # Keys count on from shard to shard.
  assert [n.split('/')[0] for n in merged] == [
    f'train-{name}.tar' for name in names for _ in range(2)
  ]


def test_a_star_names_what_is_there(tmp_path):
  write(tmp_path, 'x-1.tar', 'x-0.tar')
  path = f'{tmp_path}/x-*.tar'
  assert shards.matches(path)
  assert len(all_labels(read(path))) == 8


def test_the_home_folder_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write(tmp_path, 'train-0.tar', 'train-1.tar')
  assert shards.matches('~/train-{0..1}.tar')
  assert len(all_labels(read('~/train-{0..1}.tar'))) == 8


def test_folders_hold_shards_or_folders_of_splits(tmp_path):
  write(tmp_path / 'a', 'train-000000.tar', 'val-000000.tar')
  write(tmp_path / 'b', 'train/000000.tar', 'validation/000000.tar')
  for folder in (tmp_path / 'a', tmp_path / 'b'):
    assert shards.matches(str(folder))
    found = read(folder)
    assert {s: len(found.splits[s]) for s in picture_set.SPLITS} == {
      'train': 4,
      'val': 4,
    }


def test_only_shards_match(tmp_path):
  plain = trees.pack(
    trees.write(tmp_path / 'tree', 'cat/0.png', 'eel/0.png'),
    tmp_path / 'plain.tar',
  )
  # Outlines beside the pictures of a class folder are no captions.
  sidecars = forms.write_tar(
    tmp_path / 'sidecars.tar', members(['cat/0', 'eel/1'], txt=cls)
  )
  nested = forms.write_tar(
    tmp_path / 'nested.tar', [('n01440764.tar', plain.read_bytes())]
  )
  nested_folder = tmp_path / 'classes'
  forms.write_tar(nested_folder / 'n01440764.tar', [('0.jpg', trees.png(0))])
  captions = forms.write_tar(tmp_path / 'captions.tar', members(['0'], txt=cls))
  labelled = forms.write_tar(
    tmp_path / 'labelled.tar', members(['cat/0'], cls=cls)
  )
  for path in (plain, sidecars, nested, nested_folder, tmp_path / 'tree',
               tmp_path / 'none', tmp_path / 'none.tar', 'gs://bucket/a',
               f'{plain},{nested}', f'{tmp_path}/{{nested,plain}}.tar',
               f'{tmp_path}/a,b/c'):  # fmt: skip
    assert not shards.matches(str(path)), path
  for path in (captions, labelled, f'{captions},{labelled}',
               f'{tmp_path}/{{labelled,none}}.tar',
               f'{tmp_path}/none-{{0..9}}.tar'):  # fmt: skip
    assert shards.matches(str(path)), path


def test_missing_shards_are_named(tmp_path):
  write(tmp_path, 'train-0.tar', 'train-2.tar')
  message = refusal(f'{tmp_path}/train-{{0..2}}.tar')
  assert 'train-1.tar does not exist (1 of the 3' in message
  write(tmp_path / 'of', 'train-00000-of-00003.tar')
  message = refusal(tmp_path / 'of')
  assert 'lacks train-00001-of-00003.tar (2 of 3 shards' in message
  message = refusal(f'{tmp_path}/train-0.tar,{tmp_path}/train-0.tar')
  assert 'twice' in message
  assert 'copy them here' in refusal('gs://bucket/train-{0..2}.tar')


@pytest.mark.parametrize('keep', [700, 100, 5])
def test_a_damaged_shard_is_named(tmp_path, keep):
  write(tmp_path, 'train-0.tar', 'train-1.tar')
  os.truncate(tmp_path / 'train-1.tar', keep)
  message = refusal(f'{tmp_path}/train-{{0..1}}.tar')
  assert f'{tmp_path}/train-1.tar' in message
  assert 'again' in message


def test_a_shard_cut_between_members_is_noted(tmp_path):
  tar = forms.write_tar(tmp_path / 'a.tar', members(keys(20), cls=cls))
  end = read(tar)
  assert not any('cut short' in note for note in end.notes)
  last = max(
    int(split.read._spans[:, 0].max()) for split in end.splits.values()
  )
  # Up to the header of the last picture.
  os.truncate(tar, last - 512)
  note = read(tar).notes[-1]
  assert 'may be cut short' in note
  assert 'a.tar' in note


def test_compressed_shards_are_refused_with_the_command(tmp_path):
  plain = write(tmp_path, 'train-0.tar') / 'train-0.tar'
  (tmp_path / 'train-1.tar.gz').write_bytes(gzip.compress(plain.read_bytes()))
  path = f'{tmp_path}/train-{{1..1}}.tar.gz'
  assert shards.matches(path)
  assert 'gunzip' in refusal(path)


# Splits.


def test_a_tenth_of_the_keys_is_held_out(tmp_path):
  write(tmp_path, 'train-0.tar', 'train-1.tar', count=100)
  path = f'{tmp_path}/train-{{0..1}}.tar'
  found = read(path)
  assert 8 < len(found.splits['val']) < 40
  assert len(all_labels(found)) == 200
  assert 'one image in ten is held out' in found.origin
  # By key alone: shards that are cut otherwise hold out the same.
  together = [
    member
    for number in range(2)
    for member in members(keys(100, 100 * number), cls=cls)
  ]
  single = read(forms.write_tar(tmp_path / 'all.tar', together))
  for split in picture_set.SPLITS:
    assert [n.split('/')[1] for n in found.splits[split].names] == [
      n.split('/')[1] for n in single.splits[split].names
    ]
    assert found.splits[split].fingerprint == single.splits[split].fingerprint


def test_keys_that_begin_anew_in_each_shard_are_held_out_apart(tmp_path):
  for number in range(20):
    forms.write_tar(
      tmp_path / f'train-{number:03}.tar', members(keys(10), cls=cls)
    )
  found = read(f'{tmp_path}/train-{{000..019}}.tar')
  held = [name.split('/')[1] for name in found.splits['val'].names]
  assert len(set(held)) > 5
  assert 8 < len(held) < 40


def test_val_goes_before_test_and_test_before_holding_out(tmp_path):
  names = ('train-0.tar', 'val-0.tar', 'test-0.tar')
  write(tmp_path, *names)
  found = read(tmp_path / '{train,val,test}-0.tar')
  assert set(found.splits['val'].names[0].split('/')) & {'val-0.tar'}
  assert 'test' in found.origin
  found = read(tmp_path / '{train,test}-0.tar')
  assert found.splits['val'].names[0].startswith('test-0.tar')


def test_a_shard_whose_split_is_unknown_beside_others_is_named(tmp_path):
  write(tmp_path, 'train-0.tar', 'extra-0.tar')
  assert 'extra-0.tar tells no split' in refusal(
    f'{tmp_path}/{{train,extra}}-0.tar'
  )


# Labels.


def test_cls_are_numbers_that_stay_as_they_are(tmp_path):
  found = one(tmp_path, members(keys(20), cls=lambda i: b'%d\n' % (i % 2 * 5)))
  assert found.class_names == tuple('012345')
  assert all_labels(found) == {key: i % 2 * 5 for i, key in enumerate(keys(20))}
  assert any('4 from 0 to 5 have no images' in note for note in found.notes)


def test_cls_are_names(tmp_path):
  names = (b'tulip', b'aster', b'747')
  found = one(tmp_path, members(keys(20), cls=lambda i: names[i % 3]))
  assert found.class_names == ('747', 'aster', 'tulip')
  assert all_labels(found)['0000'] == 2


@pytest.mark.parametrize(
  ('ending', 'make'),
  [
    ('txt', lambda i: b'aster' if i % 2 else b'tulip'),
    ('json', lambda i: json.dumps({'class_name': 'ta'[i % 2] * 5}).encode()),
    ('json', lambda i: json.dumps({'label': 'ta'[i % 2] * 5}).encode()),
  ],
)
def test_numbers_take_names_from_what_is_beside_them(tmp_path, ending, make):
  found = one(
    tmp_path,
    members(keys(20), cls=lambda i: b'%d' % (i % 2), **{ending: make}),
  )
  assert [name[0] for name in found.class_names] == ['t', 'a']
  assert all_labels(found)['0001'] == 1


@pytest.mark.parametrize(
  'make',
  [
    lambda i: b'caption %d' % i,
    # A name for two classes.
    lambda i: b'flower',
    lambda i: b'',
  ],
)
def test_texts_that_do_not_name_classes_leave_numbers(tmp_path, make):
  found = one(tmp_path, members(keys(20), cls=cls, txt=make))
  assert found.class_names == ('0', '1', '2')


@pytest.mark.parametrize(
  'make',
  [
    lambda i: {'label': i % 3},
    lambda i: {'cls': str(i % 3)},
    lambda i: {'class': {'no': 1}, 'target': i % 3, 'width': 640},
  ],
)
def test_json_has_numbers(tmp_path, make):
  found = one(
    tmp_path, members(keys(20), json=lambda i: json.dumps(make(i)).encode())
  )
  assert all_labels(found)['0002'] == 2
  assert found.class_names == ('0', '1', '2')


def test_json_has_numbers_and_names(tmp_path):
  names = ('tulip', 'aster')
  found = one(
    tmp_path,
    members(
      keys(20),
      json=lambda i: json.dumps(
        {'label': i % 2, 'class_name': names[i % 2]}
      ).encode(),
    ),
  )
  assert found.class_names == names
  assert all_labels(found)['0003'] == 1


def test_json_has_names(tmp_path):
  found = one(
    tmp_path,
    members(
      keys(20), json=lambda i: json.dumps({'label': 'ba'[i % 2]}).encode()
    ),
  )
  assert found.class_names == ('a', 'b')
  assert all_labels(found)['0000'] == 1


def test_txt_are_classes_if_they_come_often(tmp_path):
  names = (b'tulip', b'aster\n')
  found = one(tmp_path, members(keys(20), txt=lambda i: names[i % 2]))
  assert found.class_names == ('aster', 'tulip')
  assert any('taken for classes' in note for note in found.notes)


def test_captions_are_no_classes(tmp_path):
  found = one(
    tmp_path,
    members(
      keys(20), txt=lambda i: b'flower %d' % i, json=lambda i: b'{"url": "x"}'
    ),
  )
  assert not found.class_names
  assert not any(all_labels(found).values())
  assert any('captions' in note for note in found.notes)


def test_pictures_alone_have_no_classes(tmp_path):
  found = one(tmp_path, [(f'{key}.jpg', trees.png(0)) for key in keys(20)])
  assert not found.class_names
  assert any('no classes' in note for note in found.notes)


@pytest.mark.parametrize(
  ('endings', 'message'),
  [
    ({'cls': cls}, r'0020\.jpg has no \.cls beside it, as have 1 of 21'),
    (
      {'json': lambda i: b'{"label": 1}'},
      r'0020\.jpg has no label in a \.json beside it',
    ),
    ({'txt': lambda i: b'rose'}, r'0020\.jpg has no class in a \.txt'),
  ],
)
def test_a_picture_without_a_label_beside_others_is_named(
  tmp_path, endings, message
):
  contents = [*members(keys(20), **endings), ('0020.jpg', trees.png(1))]
  with pytest.raises(errors.DataError, match=message):
    one(tmp_path, contents)


@pytest.mark.parametrize('text', [b'', b'-1', b'100000', b'x' * 200])
def test_what_cannot_be_a_class_is_named(tmp_path, text):
  contents = members(keys(20), cls=lambda i: text if i == 7 else b'1')
  if text == b'-1' or text.isdigit():
    message = r'0007\.jpg is of class'
  else:
    message = r'the \.cls of a\.tar/0007\.jpg is'
  with pytest.raises(errors.DataError, match=message):
    one(tmp_path, contents)


# Members.


def test_keys_end_at_the_first_dot_and_have_folders(tmp_path):
  contents = [
    ('./a/x.y/1.5.jpg', trees.png(0)),
    ('b/1.JPG', trees.png(1)),
    ('b/1.cls', b'1'),
    ('a/x.y/1.cls', b'0'),
  ]
  # The key of the first is a/x.y/1, whose only picture is .5.jpg.
  with pytest.raises(errors.DataError, match='no images|no picture'):
    one(tmp_path, [contents[3], ('c.cls', b'1')])
  found = one(tmp_path, contents)
  assert all_labels(found) == {'1': 1}
  assert any('a/x.y/1' in note for note in found.notes)


def test_a_longer_ending_counts_where_there_is_no_other(tmp_path):
  contents = [
    member
    for i, key in enumerate(keys(20))
    for member in ((f'{key}.image.jpg', trees.png(i)), (f'{key}.cls', cls(i)))
  ]
  assert len(all_labels(one(tmp_path, contents))) == 20
  contents.append(('0020.mask.jpg', trees.png(0)))
  contents.append(('0020.cls', b'0'))
  with pytest.raises(errors.DataError, match=r'KEY\.image\.jpg and KEY\.mask'):
    one(tmp_path, contents)


def test_of_several_pictures_of_a_key_the_first_kind_is_read(tmp_path):
  contents = [
    member
    for i, key in enumerate(keys(20))
    for member in (
      (f'{key}.seg.png', b'other'),
      (f'{key}.png', b'other'),
      (f'{key}.jpg', trees.png(i)),
      (f'{key}.cls', cls(i)),
    )
  ]
  found = one(tmp_path, contents)
  assert found.splits['train'].read(0).startswith(trees.png(0)[:60])
  assert any('several pictures of a key' in note for note in found.notes)
  assert found.skipped == {'.png': 40}


def test_what_is_no_picture_is_counted(tmp_path):
  contents = [
    *members(keys(20), cls=cls, npy=lambda i: b'x'),
    ('0021.heif2', b'x'),
    ('README', b'x'),
    ('.DS_Store', b'x'),
    ('._0001.jpg', b'x'),
    ('__MACOSX/0001.jpg', b'x'),
    ('0022.jpg', b''),
    ('0022.cls', b'1'),
  ]
  found = one(tmp_path, contents)
  assert found.skipped == {'.npy': 20, '.heif2': 1, 'no suffix': 1}
  assert [bad.path for bad in found.bad] == ['a.tar/0022.jpg']
  assert len(all_labels(found)) == 20


def test_order_is_that_of_the_tar(tmp_path):
  names = ['9', '1', '5', '0']
  for split in ('train', 'val'):
    forms.write_tar(tmp_path / f'{split}-0.tar', members(names, cls=cls))
  found = read(tmp_path / '{train,val}-0.tar')
  assert [n.split('/')[1][0] for n in found.splits['train'].names] == names


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, '_OPEN', 3)
  write(
    tmp_path, *(f'{s}-{i:02}.tar' for s in ('train', 'val') for i in range(9))
  )
  found = read(f'{tmp_path}/{{train,val}}-{{00..08}}.tar')
  split = found.splits['train']
  before = len(os.listdir('/proc/self/fd'))
  wanted = [trees.png(i) for _ in range(9) for i in range(4)]
  assert [split.read(i) for i in range(36)] == wanted
  assert len(os.listdir('/proc/self/fd')) <= before + 3
  copy = pickle.loads(pickle.dumps(split))
  assert copy.read(35) == wanted[-1]
  del split, found


def test_a_shard_that_goes_or_shrinks_is_named(tmp_path):
  write(tmp_path, 'train-0.tar', 'val-0.tar')
  found = read(f'{tmp_path}/{{train,val}}-0.tar')
  copy = pickle.dumps(found.splits['train'])
  os.truncate(tmp_path / 'train-0.tar', 600)
  with pytest.raises(
    errors.DataError, match=r'train-0\.tar has become shorter'
  ):
    pickle.loads(copy).read(3)
  (tmp_path / 'train-0.tar').unlink()
  with pytest.raises(errors.DataError, match=r'train-0\.tar: No such file'):
    pickle.loads(copy).read(0)


def test_shards_are_listed_once(tmp_path, monkeypatch):
  write(tmp_path, 'train-0.tar', 'val-0.tar')
  path = f'{tmp_path}/{{train,val}}-0.tar'
  first = read(path)
  assert read(path) is first
  forms.write_tar(tmp_path / 'val-0.tar', members(keys(9), cls=cls))
  assert len(read(path).splits['val']) == 9


def test_fingerprints_see_pictures_and_labels(tmp_path):
  prints = set()
  for number, (start, label) in enumerate([(0, b'1'), (1, b'1'), (0, b'0')]):
    contents = [
      member
      for i, key in enumerate(keys(20))
      for member in (
        (f'{key}.jpg', trees.png(i + start)),
        (f'{key}.cls', label if i else b'1'),
      )
    ]
    path = forms.write_tar(tmp_path / f'{number}.tar', contents)
    prints.add(read(path).fingerprint)
  assert len(prints) == 3
