"""`make peers`: what is left has a reason, what cannot run is skipped with one."""

import xml.etree.ElementTree as ElementTree

from tests.peers.__main__ import PEERS, main, summarise

REPORT = """
<s>
  <testcase name="a"/>
  <testcase name="b[1]"><failure/></testcase>
  <testcase name="c"><skipped/></testcase>
</s>
"""


def test_a_failure_needs_a_reason(capsys):
    cases = list(ElementTree.fromstring(REPORT))
    assert not summarise("jax", cases, {})
    assert "b[1]: UNEXPECTED" in capsys.readouterr().out
    assert summarise("jax", cases, {"^b": "theirs"})
    assert "1 of 2 passed, 1 skipped" in capsys.readouterr().out


def test_no_test_at_all_is_no_success():
    assert not summarise("jax", [], {})


def test_a_missing_checkout_is_skipped_with_the_reason(tmp_path, capsys):
    theirs = [name for name, peer in PEERS.items() if peer.checkout]
    assert main([str(tmp_path), *theirs]) == 0
    assert capsys.readouterr().out.count("skipped") == len(theirs)
