"""The README's example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["y"].shape == names["x"].shape == (8, 1000, 64)
    assert names["z"].shape == (8, 64, 1000)


def test_commands_that_ci_takes_are_one_line_each():
    commands = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]
    assert "fastkit demo" in commands[0] and "pytest" in commands[1]
