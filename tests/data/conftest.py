# SPDX-License-Identifier: Apache-2.0
import pytest
from mds_by_hand import texts

from hourllava.data.shards import write_shards


@pytest.fixture
def shards(tmp_path):
    """A folder of 100 texts in about 17 shards."""
    write_shards(texts(100), tmp_path / "shards", size_limit=1200)
    assert 10 < len(list((tmp_path / "shards").glob("*.mds"))) < 30
    return tmp_path / "shards"
