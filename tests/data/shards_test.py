import gzip
import os
import pickle

import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import picture_set, shards, tars
from tests.data import forms, trees
from tests.data import webdatasets as wd


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
  wd.write(tmp_path, *(f'train-{name}.tar' for name in names), count=2)
  path = f'{tmp_path}/{pattern}'.replace(',train', f',{tmp_path}/train')
  assert shards.matches(path)
  found = wd.read(path)
  merged = sorted(
    (n for s in picture_set.SPLITS for n in found.splits[s].names),
    key=lambda name: int(name.split('/')[1].split('.')[0]),
  )
  # Keys count on from shard to shard.
  assert [n.split('/')[0] for n in merged] == [
    f'train-{name}.tar' for name in names for _ in range(2)
  ]


def test_a_star_names_what_is_there(tmp_path):
  wd.write(tmp_path, 'x-1.tar', 'x-0.tar')
  path = f'{tmp_path}/x-*.tar'
  assert shards.matches(path)
  assert len(wd.all_labels(wd.read(path))) == 8


def test_the_home_folder_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  wd.write(tmp_path, 'train-0.tar', 'train-1.tar')
  assert shards.matches('~/train-{0..1}.tar')
  assert len(wd.all_labels(wd.read('~/train-{0..1}.tar'))) == 8


def test_folders_hold_shards_or_folders_of_splits(tmp_path):
  wd.write(tmp_path / 'a', 'train-000000.tar', 'val-000000.tar')
  wd.write(tmp_path / 'b', 'train/000000.tar', 'validation/000000.tar')
  for folder in (tmp_path / 'a', tmp_path / 'b'):
    assert shards.matches(str(folder))
    found = wd.read(folder)
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
    tmp_path / 'sidecars.tar',
    wd.members(['cat/0', 'eel/1'], txt=wd.cls),
  )
  nested = forms.write_tar(
    tmp_path / 'nested.tar', [('n01440764.tar', plain.read_bytes())]
  )
  nested_folder = tmp_path / 'classes'
  forms.write_tar(nested_folder / 'n01440764.tar', [('0.jpg', trees.png(0))])
  captions = forms.write_tar(
    tmp_path / 'captions.tar', wd.members(['0'], txt=wd.cls)
  )
  labelled = forms.write_tar(
    tmp_path / 'labelled.tar',
    wd.members(['cat/0'], cls=wd.cls),
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
  wd.write(tmp_path, 'train-0.tar', 'train-2.tar')
  message = wd.refusal(f'{tmp_path}/train-{{0..2}}.tar')
  assert 'train-1.tar does not exist (1 of the 3' in message
  wd.write(tmp_path / 'of', 'train-00000-of-00003.tar')
  message = wd.refusal(tmp_path / 'of')
  assert 'lacks train-00001-of-00003.tar (2 of 3 shards' in message
  message = wd.refusal(f'{tmp_path}/train-0.tar,{tmp_path}/train-0.tar')
  assert 'twice' in message
  assert 'copy them here' in wd.refusal('gs://bucket/train-{0..2}.tar')


@pytest.mark.parametrize('keep', [700, 100, 5])
def test_a_damaged_shard_is_named(tmp_path, keep):
  wd.write(tmp_path, 'train-0.tar', 'train-1.tar')
  os.truncate(tmp_path / 'train-1.tar', keep)
  message = wd.refusal(f'{tmp_path}/train-{{0..1}}.tar')
  assert f'{tmp_path}/train-1.tar' in message
  assert 'again' in message


def test_a_shard_cut_between_members_is_noted(tmp_path):
  tar = forms.write_tar(
    tmp_path / 'a.tar',
    wd.members(wd.keys(20), cls=wd.cls),
  )
  end = wd.read(tar)
  assert not any('cut short' in note for note in end.notes)
  last = max(
    int(split.read._spans[:, 0].max()) for split in end.splits.values()
  )
  # Up to the header of the last picture.
  os.truncate(tar, last - 512)
  note = wd.read(tar).notes[-1]
  assert 'may be cut short' in note
  assert 'a.tar' in note


def test_compressed_shards_are_refused_with_the_command(tmp_path):
  plain = wd.write(tmp_path, 'train-0.tar') / 'train-0.tar'
  (tmp_path / 'train-1.tar.gz').write_bytes(gzip.compress(plain.read_bytes()))
  path = f'{tmp_path}/train-{{1..1}}.tar.gz'
  assert shards.matches(path)
  assert 'gunzip' in wd.refusal(path)


# Splits.


def test_a_tenth_of_the_keys_is_held_out(tmp_path):
  wd.write(tmp_path, 'train-0.tar', 'train-1.tar', count=100)
  path = f'{tmp_path}/train-{{0..1}}.tar'
  found = wd.read(path)
  assert 8 < len(found.splits['val']) < 40
  assert len(wd.all_labels(found)) == 200
  assert 'one image in ten is held out' in found.origin
  # By key alone: shards that are cut otherwise hold out the same.
  together = [
    member
    for number in range(2)
    for member in wd.members(wd.keys(100, 100 * number), cls=wd.cls)
  ]
  single = wd.read(forms.write_tar(tmp_path / 'all.tar', together))
  for split in picture_set.SPLITS:
    assert [n.split('/')[1] for n in found.splits[split].names] == [
      n.split('/')[1] for n in single.splits[split].names
    ]
    assert found.splits[split].fingerprint == single.splits[split].fingerprint


def test_keys_that_begin_anew_in_each_shard_are_held_out_apart(tmp_path):
  for number in range(20):
    forms.write_tar(
      tmp_path / f'train-{number:03}.tar',
      wd.members(wd.keys(10), cls=wd.cls),
    )
  found = wd.read(f'{tmp_path}/train-{{000..019}}.tar')
  held = [name.split('/')[1] for name in found.splits['val'].names]
  assert len(set(held)) > 5
  assert 8 < len(held) < 40


def test_val_goes_before_test_and_test_before_holding_out(tmp_path):
  names = ('train-0.tar', 'val-0.tar', 'test-0.tar')
  wd.write(tmp_path, *names)
  found = wd.read(tmp_path / '{train,val,test}-0.tar')
  assert set(found.splits['val'].names[0].split('/')) & {'val-0.tar'}
  assert 'test' in found.origin
  found = wd.read(tmp_path / '{train,test}-0.tar')
  assert found.splits['val'].names[0].startswith('test-0.tar')


def test_a_shard_whose_split_is_unknown_beside_others_is_named(tmp_path):
  wd.write(tmp_path, 'train-0.tar', 'extra-0.tar')
  assert 'extra-0.tar tells no split' in wd.refusal(
    f'{tmp_path}/{{train,extra}}-0.tar'
  )


def test_keys_end_at_the_first_dot_and_have_folders(tmp_path):
  contents = [
    ('./a/x.y/1.5.jpg', trees.png(0)),
    ('b/1.JPG', trees.png(1)),
    ('b/1.cls', b'1'),
    ('a/x.y/1.cls', b'0'),
  ]
  # The key of the first is a/x.y/1, whose only picture is .5.jpg.
  with pytest.raises(errors.DataError, match='no images|no picture'):
    wd.one(tmp_path, [contents[3], ('c.cls', b'1')])
  found = wd.one(tmp_path, contents)
  assert wd.all_labels(found) == {'1': 1}
  assert any('a/x.y/1' in note for note in found.notes)


def test_a_longer_ending_counts_where_there_is_no_other(tmp_path):
  contents = [
    member
    for i, key in enumerate(wd.keys(20))
    for member in (
      (f'{key}.image.jpg', trees.png(i)),
      (f'{key}.cls', wd.cls(i)),
    )
  ]
  assert len(wd.all_labels(wd.one(tmp_path, contents))) == 20
  contents.append(('0020.mask.jpg', trees.png(0)))
  contents.append(('0020.cls', b'0'))
  with pytest.raises(errors.DataError, match=r'KEY\.image\.jpg and KEY\.mask'):
    wd.one(tmp_path, contents)


def test_of_several_pictures_of_a_key_the_first_kind_is_read(tmp_path):
  contents = [
    member
    for i, key in enumerate(wd.keys(20))
    for member in (
      (f'{key}.seg.png', b'other'),
      (f'{key}.png', b'other'),
      (f'{key}.jpg', trees.png(i)),
      (f'{key}.cls', wd.cls(i)),
    )
  ]
  found = wd.one(tmp_path, contents)
  assert found.splits['train'].read(0).startswith(trees.png(0)[:60])
  assert any('several pictures of a key' in note for note in found.notes)
  assert found.skipped == {'.png': 40}


def test_what_is_no_picture_is_counted(tmp_path):
  contents = [
    *wd.members(wd.keys(20), cls=wd.cls, npy=lambda i: b'x'),
    ('0021.heif2', b'x'),
    ('README', b'x'),
    ('.DS_Store', b'x'),
    ('._0001.jpg', b'x'),
    ('__MACOSX/0001.jpg', b'x'),
    ('0022.jpg', b''),
    ('0022.cls', b'1'),
  ]
  found = wd.one(tmp_path, contents)
  assert found.skipped == {'.npy': 20, '.heif2': 1, 'no suffix': 1}
  assert [bad.path for bad in found.bad] == ['a.tar/0022.jpg']
  assert len(wd.all_labels(found)) == 20


def test_order_is_that_of_the_tar(tmp_path):
  names = ['9', '1', '5', '0']
  for split in ('train', 'val'):
    forms.write_tar(
      tmp_path / f'{split}-0.tar',
      wd.members(names, cls=wd.cls),
    )
  found = wd.read(tmp_path / '{train,val}-0.tar')
  assert [n.split('/')[1][0] for n in found.splits['train'].names] == names


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
  monkeypatch.setattr(tars, '_OPEN', 3)
  wd.write(
    tmp_path, *(f'{s}-{i:02}.tar' for s in ('train', 'val') for i in range(9))
  )
  found = wd.read(f'{tmp_path}/{{train,val}}-{{00..08}}.tar')
  split = found.splits['train']
  before = len(os.listdir('/proc/self/fd'))
  wanted = [trees.png(i) for _ in range(9) for i in range(4)]
  assert [split.read(i) for i in range(36)] == wanted
  assert len(os.listdir('/proc/self/fd')) <= before + 3
  copy = pickle.loads(pickle.dumps(split))
  assert copy.read(35) == wanted[-1]
  del split, found


def test_a_shard_that_goes_or_shrinks_is_named(tmp_path):
  wd.write(tmp_path, 'train-0.tar', 'val-0.tar')
  found = wd.read(f'{tmp_path}/{{train,val}}-0.tar')
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
  wd.write(tmp_path, 'train-0.tar', 'val-0.tar')
  path = f'{tmp_path}/{{train,val}}-0.tar'
  first = wd.read(path)
  assert wd.read(path) is first
  forms.write_tar(
    tmp_path / 'val-0.tar',
    wd.members(wd.keys(9), cls=wd.cls),
  )
  assert len(wd.read(path).splits['val']) == 9


def test_fingerprints_see_pictures_and_labels(tmp_path):
  prints = set()
  for number, (start, label) in enumerate([(0, b'1'), (1, b'1'), (0, b'0')]):
    contents = [
      member
      for i, key in enumerate(wd.keys(20))
      for member in (
        (f'{key}.jpg', trees.png(i + start)),
        (f'{key}.cls', label if i else b'1'),
      )
    ]
    path = forms.write_tar(tmp_path / f'{number}.tar', contents)
    prints.add(wd.read(path).fingerprint)
  assert len(prints) == 3


def test_keys_that_come_twice_in_a_shard_are_noted(tmp_path):
  contents = wd.members(wd.keys(20), cls=wd.cls)
  found = wd.one(tmp_path, [*contents, *contents[:2]])
  assert len(wd.all_labels(found)) == 20
  assert any(
    '2 members come several times in their shard, such as a.tar/0000' in note
    for note in found.notes
  )


def test_keys_with_dots_are_not_taken_for_one(tmp_path):
  contents = [
    member
    for i in range(8)
    for member in (
      (f'photo.v2.{i:03}.jpg', trees.png(i)),
      (f'photo.v2.{i:03}.cls', wd.cls(i)),
    )
  ]
  with pytest.raises(errors.DataError, match=r'KEY\.v2\.000\.jpg and KEY\.v2'):
    wd.one(tmp_path, contents)


def test_a_missing_shard_of_a_folder_is_noted(tmp_path):
  names = [f'{i:03}.tar' for i in (0, 1, 3, 4)]
  found = wd.read(wd.write(tmp_path, *names))
  assert any(note.startswith('002.tar is not there') for note in found.notes)
