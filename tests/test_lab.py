"""The lab grades as it says: what is empty or wrong fails, with its own hint; what is right passes."""
import ast
import functools
import re
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import lab
import train
from conftest import SECONDS

NUMBERED = {task.title: (number, task) for number, task in enumerate(lab.EXERCISES, 1)}


@pytest.mark.parametrize("title", NUMBERED)
def test_empty_fails_and_the_reference_passes(title):
    number, task = NUMBERED[title]
    source = (lab.HERE / task.file).read_text("utf-8")
    empty = lab.cut(source, number)
    for name in task.names:
        was, now = lab.find(source, name), lab.find(empty, name)
        assert ast.get_docstring(was) == ast.get_docstring(now) and ast.dump(was.args) == ast.dump(now.args)
        assert len(now.body) == 2 and f"exercise {number}:" in ast.unparse(now.body[1])
    with pytest.raises(NotImplementedError):
        lab.measure(task, lab.module_of(task, empty, task.file))
    assert lab.judge(number, lab.measure(task, lab.module_of(task, source, task.file))) == ([], [])


WRONG = [(title, hint) for title, (_, task) in NUMBERED.items() for hint in task.wrong]


@pytest.mark.parametrize("title, hint", WRONG)
def test_wrong_answers_fail_with_their_own_hint(title, hint):
    number, task = NUMBERED[title]
    source = lab.edited(task, task.wrong[hint])
    wrong, hints = lab.judge(number, lab.measure(task, lab.module_of(task, source, task.file)))
    assert wrong and hints == [hint]


@pytest.mark.parametrize("title, edit", [(title, edit) for title, (_, task) in NUMBERED.items() for edit in task.same])
def test_other_right_answers_pass(title, edit):
    number, task = NUMBERED[title]
    source = lab.edited(task, edit)
    assert source != (lab.HERE / task.file).read_text("utf-8")
    assert lab.judge(number, lab.measure(task, lab.module_of(task, source, task.file))) == ([], [])


def test_every_exercise_has_enough_wrong_and_right_answers():
    assert len(NUMBERED) == len(lab.EXERCISES) >= 12
    for task in lab.EXERCISES:
        assert len(task.wrong) >= 6 and len(task.same) >= 3
        names = [name for other in lab.EXERCISES for name in other.names if other.file == task.file]
        assert len(names) == len({*names})  # no function is asked for twice


def test_a_name_that_is_gone_is_an_error():
    for name in ("gone", "Tokenizer.gone", "Gone.merge"):
        with pytest.raises(LookupError):
            lab.find((lab.HERE / "tokenizer/__init__.py").read_text("utf-8"), name)


def test_the_list_names_every_exercise(capsys):
    lab.main([])
    printed = capsys.readouterr().out
    assert all(f"{number:3}  {title}: " in printed for title, (number, _) in NUMBERED.items())
    assert lab.EXPERIMENTS in printed


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A working copy without the code of exercises 3, 4, 10 and 13."""
    folder = tmp_path_factory.mktemp("lab") / "copy"
    lab.main(["start", "3", "4", "10", "13", "--to", str(folder)])
    return folder


def answer(copy, number, name, code):
    """Writes code in place of a NotImplementedError in wuerstchen.py"""
    path, indent = copy / "wuerstchen.py", " " * 4 * (2 if "." in name else 1)
    lines = path.read_text("utf-8").splitlines()
    first, last = lab.body_of(path.read_text("utf-8"), name)
    assert first == last and f"exercise {number}:" in lines[first - 1]
    lines[first - 1:last] = textwrap.indent(code, indent).splitlines()
    path.write_text("\n".join(lines) + "\n", "utf-8")


def run(copy, *args):
    return subprocess.run([sys.executable, "tests/lab.py", *args], cwd=copy, capture_output=True, text=True,
                          timeout=SECONDS)


def test_a_working_copy_from_start_to_images(copy):
    source = (lab.HERE / "wuerstchen.py").read_text("utf-8")
    solution = run(copy, "solution", "13").stdout
    assert solution.startswith("def guided(") and all(part.strip() in source for part in solution.split("\ndef "))

    first = run(copy, "check")  # those that were cut out
    assert first.returncode == 1 and first.stdout.count("empty") == 4 and "0 of 4 right" in first.stdout
    assert "exercise 3: write GlobalResponseNorm.forward" in first.stdout

    answer(copy, 3, "GlobalResponseNorm.forward", """norm = length(x)
return x + self.beta + self.gamma * x * norm / (norm.mean(-1, keepdim=True) + 1e-6)""")
    with open(copy / "wuerstchen.py", "a") as file:  # a function of the student's own
        file.write("\n\ndef length(x):\n    return x.square().sum((1, 2), keepdim=True).sqrt()\n")
    answer(copy, 4, "time_embedding", "return torch.cat([t.sin(), t.cos()], dim=7)")
    for name in ("guided", "sample"):
        first, last = lab.body_of(source, name)
        reversed_guidance = "\n".join(source.splitlines()[first - 1:last]).replace("(unconditional, conditional,",
                                                                                   "(conditional, unconditional,")
        answer(copy, 13, name, textwrap.dedent(reversed_guidance))
    checked = run(copy, "check", "3", "4", "13", "10")
    assert checked.returncode == 1 and "1 of 4 right" in checked.stdout and not checked.stderr
    assert "right  Global response" in checked.stdout and "empty  The noise schedule" in checked.stdout
    assert "hint: guidance is reversed" in checked.stdout
    trace = checked.stdout[checked.stdout.index("WRONG  Time"):checked.stdout.index(" 10 ")]
    assert "IndexError" in trace and trace.count("File ") == 1 and str(copy / "wuerstchen.py") in trace
    assert "return torch.cat([t.sin(), t.cos()], dim=7)" in trace  # the line in the student's own file

    for name, same in (("lab_3", True), ("lab_13", False)):  # the student's row, above the reference's
        sheet = np.array(Image.open(copy / f"{name}.png")).astype(int)
        assert (abs(sheet[4:132, 4:396] - sheet[136:264, 4:396]).max() < 9) == same
    assert not (copy / "lab_4.png").exists()


def test_finale_trains_and_generates_with_the_students_functions(monkeypatch, tmp_path, capsys):
    """Each of them is called, also by the student's other functions; the reference's are not."""
    mine, theirs = set(), set()

    def noting(function, names, name):
        return functools.wraps(function)(lambda *args, **options: names.add(name) or function(*args, **options))

    def students(task, students=lab.students):
        module = students(task)
        for name in task.names:
            setattr(module, name, noting(getattr(module, name), mine, name))
        return module

    names = [name for task in lab.EXERCISES if task.probe in (lab.noising, lab.p2, lab.steps, lab.sampling)
             for name in task.names]
    for place in (lab.wuerstchen, train, lab.sample):
        for name in names:
            if hasattr(place, name):  # for monkeypatch to put back
                monkeypatch.setattr(place, name, noting(getattr(place, name), theirs, name))
    main = train.main  # finale has generated with the reference's functions before
    monkeypatch.setattr(train, "main", lambda argv: theirs.clear() or main(argv))
    monkeypatch.setattr(lab, "students", students)
    monkeypatch.chdir(tmp_path)
    lab.finale(2, ["--steps", "1", "--batch-size", "2", "--cache", "16"])
    assert mine == set(names) - {"ddim_step"} and not theirs
    assert (tmp_path / "lab_finale.png").exists()
    assert re.search("% of 2 captions fully correct after 0.[0-9] minutes", capsys.readouterr().out)


def test_an_endless_loop_is_wrong(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(lab, "grade", lambda number: number == 1 or ended.wait())
    monkeypatch.setattr(lab, "SECONDS", 0.2)
    threads = torch.get_num_threads()
    assert not lab.check([1, 2, 3])
    torch.set_num_threads(threads)
    ended.set()
    assert "does a loop never end?" in (printed := capsys.readouterr().out) and "1 of 3 right" in printed


def test_folders_and_numbers_that_are_wrong(tmp_path, capsys):
    outside = "--to DIR must be a new folder outside the project"
    for arguments, message in ((["start", "3", "--to", str(tmp_path)], outside), (["start", "3"], outside),
                               (["start", "3", "--to", str(lab.HERE / "lab")], "outside"), (["check", "99"], "1 to 14"),
                               (["check", "3"], "needs a working copy"), (["finale"], "needs a working copy"),
                               (["x"], "list")):
        with pytest.raises(SystemExit):
            lab.main(arguments)
        assert message in capsys.readouterr().err
