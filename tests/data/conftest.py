"""A folder of images in class folders, with files that do not count."""

import pytest
from input_files import save


@pytest.fixture
def tree(tmp_path):
    for name in ("shoe/b.png", "shoe/a.JPG", "bag/c.png", "top.png"):
        save(tmp_path / "in" / name, format="PNG")
    (tmp_path / "in/bag/notes.txt").write_text("not an image")
    save(tmp_path / "in/bag/.hidden.png")
    save(tmp_path / "in/.cache/d.png")
    return tmp_path / "in"
