import json

import pytest

from selfboottok_jax import errors
from tests.data import trees
from tests.data import webdatasets as wd


def test_cls_are_numbers_that_stay_as_they_are(tmp_path):
  found = wd.one(
    tmp_path,
    wd.members(wd.keys(20), cls=lambda i: b'%d\n' % (i % 2 * 5)),
  )
  assert found.class_names == tuple('012345')
  assert wd.all_labels(found) == {
    key: i % 2 * 5 for i, key in enumerate(wd.keys(20))
  }
  assert any('4 from 0 to 5 have no images' in note for note in found.notes)


def test_cls_are_names(tmp_path):
  names = (b'tulip', b'aster', b'747')
  found = wd.one(
    tmp_path,
    wd.members(wd.keys(20), cls=lambda i: names[i % 3]),
  )
  assert found.class_names == ('747', 'aster', 'tulip')
  assert wd.all_labels(found)['0000'] == 2


@pytest.mark.parametrize(
  ('ending', 'make'),
  [
    ('txt', lambda i: b'aster' if i % 2 else b'tulip'),
    ('json', lambda i: json.dumps({'class_name': 'ta'[i % 2] * 5}).encode()),
    ('json', lambda i: json.dumps({'label': 'ta'[i % 2] * 5}).encode()),
  ],
)
def test_numbers_take_names_from_what_is_beside_them(tmp_path, ending, make):
  found = wd.one(
    tmp_path,
    wd.members(wd.keys(20), cls=lambda i: b'%d' % (i % 2), **{ending: make}),
  )
  assert [name[0] for name in found.class_names] == ['t', 'a']
  assert wd.all_labels(found)['0001'] == 1


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
  found = wd.one(
    tmp_path,
    wd.members(wd.keys(20), cls=wd.cls, txt=make),
  )
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
  found = wd.one(
    tmp_path,
    wd.members(wd.keys(20), json=lambda i: json.dumps(make(i)).encode()),
  )
  assert wd.all_labels(found)['0002'] == 2
  assert found.class_names == ('0', '1', '2')


def test_json_has_numbers_and_names(tmp_path):
  names = ('tulip', 'aster')
  found = wd.one(
    tmp_path,
    wd.members(
      wd.keys(20),
      json=lambda i: json.dumps(
        {'label': i % 2, 'class_name': names[i % 2]}
      ).encode(),
    ),
  )
  assert found.class_names == names
  assert wd.all_labels(found)['0003'] == 1


def test_json_has_names(tmp_path):
  found = wd.one(
    tmp_path,
    wd.members(
      wd.keys(20),
      json=lambda i: json.dumps({'label': 'ba'[i % 2]}).encode(),
    ),
  )
  assert found.class_names == ('a', 'b')
  assert wd.all_labels(found)['0000'] == 1


def test_txt_are_classes_if_they_come_often(tmp_path):
  names = (b'tulip', b'aster\n')
  found = wd.one(
    tmp_path,
    wd.members(wd.keys(20), txt=lambda i: names[i % 2]),
  )
  assert found.class_names == ('aster', 'tulip')
  assert any('taken for classes' in note for note in found.notes)


def test_captions_are_no_classes(tmp_path):
  found = wd.one(
    tmp_path,
    wd.members(
      wd.keys(20),
      txt=lambda i: b'flower %d' % i,
      json=lambda i: b'{"url": "x"}',
    ),
  )
  assert not found.class_names
  assert not any(wd.all_labels(found).values())
  assert any('captions' in note for note in found.notes)


def test_pictures_alone_have_no_classes(tmp_path):
  found = wd.one(
    tmp_path, [(f'{key}.jpg', trees.png(0)) for key in wd.keys(20)]
  )
  assert not found.class_names
  assert any('no classes' in note for note in found.notes)


@pytest.mark.parametrize(
  ('endings', 'message'),
  [
    (
      {'cls': wd.cls},
      r'0020\.jpg has no \.cls beside it, as have 1 of 21',
    ),
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
  contents = [
    *wd.members(wd.keys(20), **endings),
    ('0020.jpg', trees.png(1)),
  ]
  with pytest.raises(errors.DataError, match=message):
    wd.one(tmp_path, contents)


@pytest.mark.parametrize('text', [b'', b'-1', b'100000', b'x' * 200])
def test_what_cannot_be_a_class_is_named(tmp_path, text):
  contents = wd.members(wd.keys(20), cls=lambda i: text if i == 7 else b'1')
  if text == b'-1' or text.isdigit():
    message = r'0007\.jpg is of class'
  else:
    message = r'the \.cls of a\.tar/0007\.jpg is'
  with pytest.raises(errors.DataError, match=message):
    wd.one(tmp_path, contents)
