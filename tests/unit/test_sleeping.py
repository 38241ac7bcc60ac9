"""Legal and illegal steps between an engine's states."""

from __future__ import annotations

import pytest

from slipstream.generation.sleeping import SleepState


@pytest.fixture
def state():
    return SleepState(enabled=True)


def sleep(state, level=1):
    state.check_sleep(level)
    state.fell_asleep(level)


def wake(state, tags=None):
    state.woke(state.check_wake(tags))


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_only_waking_is_allowed(state, level):
    sleep(state, level)
    assert str(state) == f"asleep (level {level})"
    for check in (state.check_generate, state.check_update, lambda: state.check_sleep(1)):
        with pytest.raises(RuntimeError, match=rf"the engine is asleep \(level {level}\); call wake\(\)"):
            check()
    wake(state)
    assert str(state) == "awake"
    state.check_generate()
    state.check_update()


def test_weights_wake_before_the_cache(state):
    sleep(state, 2)
    wake(state, ["weights"])
    assert str(state) == "half awake (weights awake, kv_cache asleep since a level 2 sleep)"
    state.check_update()
    with pytest.raises(RuntimeError, match="generate: the engine is half awake"):
        state.check_generate()
    with pytest.raises(RuntimeError, match="sleep: the engine is half awake"):
        state.check_sleep(1)
    with pytest.raises(RuntimeError, match="wake: weights is awake already"):
        wake(state, ["weights"])
    wake(state)
    state.check_generate()


def test_the_cache_can_wake_first(state):
    sleep(state)
    wake(state, ["kv_cache"])
    with pytest.raises(RuntimeError, match="update_weights: the engine is half awake"):
        state.check_update()
    wake(state, ["weights"])
    state.check_update()


def test_wrong_arguments_and_wrong_moments(state):
    with pytest.raises(RuntimeError, match="awake already"):
        wake(state)
    with pytest.raises(ValueError, match=r"level=3; allowed: 1 .* 2"):
        state.check_sleep(3)
    sleep(state)
    with pytest.raises(ValueError, match="unknown tag 'cache'; allowed: weights, kv_cache"):
        wake(state, ["cache"])
    with pytest.raises(RuntimeError, match="set vllm_enable_sleep_mode=True"):
        SleepState(enabled=False).check_sleep(1)


def test_closed_is_the_end(state):
    state.closed = True
    for check in (
        state.check_generate,
        state.check_update,
        lambda: state.check_sleep(1),
        lambda: state.check_wake(None),
    ):
        with pytest.raises(RuntimeError, match="the engine is closed; make a new one"):
            check()
