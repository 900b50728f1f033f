"""The guide's code runs, from its first block to its last."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/howto/drive-the-protocol.md"


def test_every_block_of_the_guide_runs_after_the_one_before() -> None:
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python")
    names: dict[str, object] = {}
    for block in blocks:
        # Lines of the page, so that a failure names the right one.
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], str(PAGE), "exec"), names)
    assert "cut_off" in names
