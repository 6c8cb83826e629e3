"""Broken links of a built site are reported."""

from __future__ import annotations

from benchmarks.website.links import problems


def test_links_anchors_and_loaded_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/index.html").write_text('<h2 id="there">A</h2><a href="../#top">up</a>')
    (tmp_path / "index.html").write_text(
        '<h1 id="top"></h1><a href="a/#there">1</a><a href="a/#gone">2</a><a href="b/">3</a><a href="https://x.org">4</a>'
        '<img src="c.png"><script src="https://x.org/s.js"></script>'
    )
    assert problems(tmp_path) == [
        "a/index.html has 0 titles",
        "index.html: a/#gone has no such anchor",
        "index.html: b/ is not there",
        "index.html: c.png is not there",
        "index.html loads https://x.org/s.js",
    ]
