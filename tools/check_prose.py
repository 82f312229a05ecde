"""Checks docstrings and commit subjects against the prose rule of CONTRIBUTING.md.

    python tools/check_prose.py [FILE_OR_FOLDER ...]       docstrings; by default of the whole project
    python tools/check_prose.py --commit-msg FILE          the subject of a message, as a commit-msg hook
    python tools/check_prose.py --commits main..HEAD       the subjects of a range

Knows syntax trees and commit subjects; does not know what the code does.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKED = ("dash_dist", "kernels", "launch", "tools", "tests/support")
CLAUSE = re.compile(r"(What|Of|Whether|How)\b")
SUBJECT = re.compile(r"[a-z0-9][a-z0-9_, /.-]*: \S")
WRITTEN_BY_GIT = ("Merge ", "Revert ", "fixup! ", "squash! ")
LONGEST_SUBJECT = 72
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_problems(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, Documented) and (found := CLAUSE.match(ast.get_docstring(node) or "")):
            line = node.body[0].lineno
            yield f"{path}:{line}: docstring begins with {found[0]!r}: begin with a verb or with the name of the thing"


def subject_problems(subject: str) -> Iterator[str]:
    if subject.startswith(WRITTEN_BY_GIT):
        return
    if len(subject) > LONGEST_SUBJECT:
        yield f"subject of {len(subject)} characters, at most {LONGEST_SUBJECT}: {subject}"
    if not SUBJECT.match(subject):
        yield f"subject without an area (`area: imperative`): {subject}"


def python_files(paths: list[Path]) -> list[Path]:
    return sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))


def subject_of(message: Path) -> str:
    """First line of a commit message that is no comment of Git's."""
    lines = (line.rstrip() for line in message.read_text(encoding="utf-8").splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "")


def subjects_of(commits: str) -> list[str]:
    log = ["git", "log", "--no-merges", "--format=%s", commits, "--"]
    return subprocess.run(log, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, help="Python files and folders")
    parser.add_argument("--commit-msg", type=Path, metavar="FILE", help="file of a commit message")
    parser.add_argument("--commits", metavar="RANGE", help="range of commits, such as main..HEAD")
    options = parser.parse_args()

    if options.commit_msg or options.commits:
        subjects = [subject_of(options.commit_msg)] if options.commit_msg else subjects_of(options.commits)
        problems = [problem for subject in subjects for problem in subject_problems(subject)]
    else:
        files = python_files(options.paths or [ROOT / folder for folder in CHECKED])
        problems = [problem for file in files for problem in docstring_problems(file)]
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
