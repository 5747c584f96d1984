"""Which optimizer of one worker is which of another's, and what the workers are told where they do not agree."""

import pytest

from horovod_powersgd.agreement import Claim, Told, digest, settle


def told(*parameters, steps=0, uncompressed=False, **description):
    described = {"compression": "none" if uncompressed else "PowerSGD", **description}
    described.update((f"parameter {name}", "(4, 4)") for name in parameters)
    return Told(digest(parameters), described, uncompressed, steps)


def claims(*workers):
    return [Claim(worker, asked, optimizers) for worker, (asked, optimizers) in enumerate(workers)]


def test_optimizers_that_are_stepped_in_another_order_are_known_by_their_names():
    a, b = told("a"), told("b", steps=3)
    found = settle(claims((0, [a, b]), (0, [b, a]), (1, [a, b])))
    assert sorted(s.places for s in found) == [[0, 1, 0], [1, 0, 1]]
    assert {tuple(s.places): s.root for s in found} == {(0, 1, 0): None, (1, 0, 1): 0}


def test_optimizers_of_equal_names_are_known_by_the_order_in_which_they_were_made():
    found = settle(claims((1, [told("a")] * 3), (2, [told("a")] * 3)))
    assert [s.places for s in found] == [[1, 1], [2, 2]]


def test_one_worker_may_have_made_one_more():
    a, other = told("a"), told("export")
    assert [s.places for s in settle(claims((1, [other, a]), (0, [a])))] == [[1, 0]]
    # Even of the same names: the one that is asked for is meant, or the only one that there is.
    assert [s.places for s in settle(claims((1, [a, a]), (0, [a])))] == [[1, 0]]
    found = settle(claims((1, [a, a, other]), (1, [a, other])))
    assert sorted(s.places for s in found) == [[1, 0], [2, 1]]


def test_what_cannot_be_told_apart_is_an_error():
    with pytest.raises(RuntimeError, match="Worker 0 has 2 .* cannot be told apart.*parameter a"):
        settle(claims((2, [told("a"), told("a"), told("b")]), (0, [told("a"), told("b")])))


def test_parameters_in_another_order_are_sorted():
    [found] = settle(claims((0, [told("a", "b")]), (0, [told("b", "a")])))
    assert found.by_name
    [found] = settle(claims((0, [told("a", "b")]), (0, [told("a", "b")])))
    assert not found.by_name


def test_the_worker_with_the_most_steps_gives_the_state_and_the_first_of_several():
    [found] = settle([Claim(4, 0, [told("a")]), Claim(5, 0, [told("a", steps=7)]), Claim(6, 0, [told("a", steps=7)])])
    assert found.root == 5


def test_what_differs_is_named():
    with pytest.raises(RuntimeError, match="(?s)do not agree.*rank: worker 0: 2; worker 1: 3"):
        settle(claims((0, [told("a", rank="2")]), (0, [told("a", rank="3")])))
    with pytest.raises(RuntimeError, match="parameter b: worker 0: missing; worker 1: .4, 4."):
        settle(claims((0, [told("a")]), (0, [told("a", "b")])))
    with pytest.raises(RuntimeError, match="compression: worker 0: PowerSGD; worker 1: none"):
        settle(claims((0, [told("a")]), (0, [told("a", uncompressed=True)])))


def test_horovods_own_compressions_want_nothing_to_be_the_same():
    assert settle(claims((0, [told("a", uncompressed=True)]), (0, [told("b", uncompressed=True)]))) == []
