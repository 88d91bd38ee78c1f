"""The compute process may write anywhere in its scratch folder; what the worker writes there must stay there."""

import pytest

from db import blobs
from workers.scratch import Scratch


@pytest.fixture
def scratch(tmp_path):
    made = Scratch(tmp_path / "scratch")
    yield made
    made.remove()


def test_a_blob_is_fetched_once_and_a_broken_off_attempt_does_not_stand_in_its_way(db, scratch):
    blob = blobs.write(db, [b"content"])
    (scratch.path / "blobs").mkdir()
    (scratch.path / "blobs" / f"{blob.id}.half").write_bytes(b"a longer half of something")
    name = scratch.fetch(db, blob.id)
    assert (scratch.path / name).read_bytes() == b"content"
    before = (scratch.path / name).stat().st_ino
    assert scratch.fetch(db, blob.id) == name
    assert (scratch.path / name).stat().st_ino == before


@pytest.mark.parametrize("planted", ["half", "whole", "folder"])
def test_no_link_leads_the_worker_out_of_the_folder_when_it_fetches(db, scratch, tmp_path, planted):
    blob = blobs.write(db, [b"what a stranger uploaded"])
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / "precious.py"
    precious.write_text("untouched")
    if planted == "folder":
        (scratch.path / "blobs").symlink_to(outside)
        with pytest.raises(OSError, match="blobs"):
            scratch.fetch(db, blob.id)
    else:
        (scratch.path / "blobs").mkdir()
        name = f"{blob.id}.half" if planted == "half" else blob.id
        (scratch.path / "blobs" / name).symlink_to(precious)
        scratch.fetch(db, blob.id)
    assert precious.read_text() == "untouched"
    assert [p.name for p in outside.iterdir()] == ["precious.py"]
