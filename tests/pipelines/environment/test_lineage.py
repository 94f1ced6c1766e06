import re

from pipelines.environment.lineage import code_lineage


def test_the_release_is_always_there_and_the_commit_in_a_checkout():
    lineage = code_lineage()
    assert re.fullmatch(r"\d+\.\d+.*", lineage["code_version"])
    assert lineage["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", lineage["git_commit"])
