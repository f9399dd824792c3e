import random

import pytest

from phase1.training.alarms import Alarms

STEADIER = "lower --learning-rate"


def calm(count, seed=0):
    chance = random.Random(seed)
    return [3 + 0.1 * chance.gauss(0, 1) for _ in range(count)]


def told(alarms, losses=(), norms=(), loss_scale=None, closed=()):
    return list(alarms.look(200, list(losses), list(norms), loss_scale, closed))


def test_a_calm_training_is_not_commented():
    alarms = Alarms(1.0, STEADIER)
    assert told(alarms, calm(3000), [0.5] * 3000, 2.0**16) == []


@pytest.mark.parametrize(
    "signs, says",
    [
        ({"losses": [3.6, 3.6]}, "the loss jumped by step 200: 3.600 against"),
        ({"losses": [float("nan"), float("inf")]}, "the loss was no finite number in 2 of the steps to 200"),
        ({"norms": [2.0] * 60}, "of the last 100 gradients were clipped"),
        ({"loss_scale": 1.0}, "the loss scale fell to 1.0"),
        ({"closed": [3]}, "the rank gate is closed in layer 3:"),
        ({"closed": [1, 3]}, "the rank gate is closed in layers 1, 3:"),
    ],
)
def test_a_sign_is_told_once_until_it_has_gone(signs, says):
    alarms = Alarms(1.0, STEADIER)
    told(alarms, calm(100), [0.5] * 100, 2.0**16)
    first = told(alarms, **signs)
    assert len(first) == 1 and says in first[0] and "--" in first[0]
    again = {"norms": [2.0] * 10, "loss_scale": 1.0, "closed": [1], "losses": signs.get("losses")}
    assert told(alarms, **{name: again[name] for name in signs}) == []
    told(alarms, calm(100, 1), [0.5] * 100, 2.0**16)
    assert len(told(alarms, **signs)) == 1


def test_one_hard_batch_is_no_jump_and_two_looks_see_one():
    alarms = Alarms(1.0, STEADIER)
    told(alarms, calm(100))
    assert told(alarms, [3.6, 3.0]) == [] and told(alarms, [3.6]) == []
    assert "the loss jumped" in told(alarms, [3.7])[0]


def test_too_few_steps_say_nothing():
    assert told(Alarms(1.0, STEADIER), [*calm(50), 100.0], [5.0] * 51) == []


def test_losses_that_are_no_numbers_are_not_what_others_are_compared_with():
    alarms = Alarms(1.0, STEADIER)
    told(alarms, [*calm(100), float("nan"), float("inf")])
    assert told(alarms, calm(10, 1)) == []
    assert "the loss jumped" in told(alarms, [9.0, 9.0])[0]
