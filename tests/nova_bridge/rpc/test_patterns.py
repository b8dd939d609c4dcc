"""What Nova takes this database for when it chooses how to compare with a pattern."""

import sqlalchemy
from nova.db import utils

from nova_bridge.sql import regexp


def test_pattern_filters_of_nova_are_compared_by_regexp_here_and_elsewhere_as_before(monkeypatch):
    known = getattr(utils._db_connection_type, "__wrapped__", utils._db_connection_type)
    monkeypatch.setattr(utils, "_db_connection_type", known)
    assert utils.get_regexp_ops("lucd:///nova_cell1")[1] == "LIKE"
    for _ in range(2):
        sqlalchemy.create_engine("lucd+memory:///patterns").dispose()
    assert utils.get_regexp_ops("lucd:///nova_cell1?socket=/run/lucd/lucd.sock")[1] == "REGEXP"
    assert utils.get_regexp_ops("lucd+memory:///x")[1] == "REGEXP"
    assert [utils.get_regexp_ops(url)[1] for url in ("postgresql://x", "ibm_db_sa://x")] == ["~", "LIKE"]
    escape, operator = utils.get_regexp_ops("mysql+pymysql://x")
    assert (escape("a|b"), operator) == ("a\\|b", "REGEXP")
    assert utils._db_connection_type.__wrapped__ is known


def test_null_matches_no_pattern():
    assert regexp.regexp("^a", "ab")
    assert not regexp.regexp("^b", "ab")
    assert regexp.regexp("^a", None) is None
