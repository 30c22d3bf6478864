"""The lab grades as it says: what is empty or wrong fails, with its own hint; what is right passes."""
import ast

import pytest

import lab

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
    wrong, hints = lab.judge(number, lab.measure(task, lab.module_of(task, lab.edited(task, task.wrong[hint]), task.file)))
    assert wrong and hints == [hint]


@pytest.mark.parametrize("title, edit", [(title, edit) for title, (_, task) in NUMBERED.items() for edit in task.same])
def test_other_right_answers_pass(title, edit):
    number, task = NUMBERED[title]
    source = lab.edited(task, edit)
    assert source != (lab.HERE / task.file).read_text("utf-8")
    assert lab.judge(number, lab.measure(task, lab.module_of(task, source, task.file))) == ([], [])


def test_every_exercise_has_enough_of_them():
    assert len(NUMBERED) == len(lab.EXERCISES) >= 12
    for task in lab.EXERCISES:
        assert len(task.wrong) >= 6 and len(task.same) >= 3
        names = [name for other in lab.EXERCISES for name in other.names if other.file == task.file]
        assert len(names) == len({*names})  # no function is asked for twice


def test_a_name_that_is_gone_is_an_error():
    for name in ("gone", "Tokenizer.gone", "Gone.merge"):
        with pytest.raises(LookupError):
            lab.find((lab.HERE / "tokenizer/__init__.py").read_text("utf-8"), name)
