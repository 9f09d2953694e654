"""Files are written in order, at once or in the background, and what they hold stays as it was."""

import threading

import pytest
import torch

from vlm.train.checkpoints.write_queue import WriteQueue, copy_to_host


def test_without_a_background_everything_is_done_at_once():
    queue, done, state = WriteQueue(in_background=False), [], {"weight": torch.zeros(2)}
    queue.add(lambda: done.append(threading.current_thread()))
    assert done == [threading.main_thread()]
    assert queue.is_done()
    assert queue.hold(state) is state


def test_the_background_keeps_the_order_and_raises_at_the_end():
    queue, begin, done = WriteQueue(in_background=True), threading.Event(), []

    def fail() -> None:
        raise ValueError("of the third")

    queue.add(lambda: begin.wait(300) and done.append(1))
    queue.add(lambda: done.append(2))
    queue.add(fail)
    assert not queue.is_done()
    begin.set()
    with pytest.raises(ValueError, match="of the third"):
        queue.wait()
    assert done == [1, 2]


def test_a_copy_shares_nothing():
    weight = torch.nn.Parameter(torch.zeros(2))
    state = {
        "param_groups": [{"lr": 0.1, "params": [0]}],
        "state": {0: {"exp_avg": torch.zeros(2), "step": 3}},
        "w": weight,
    }
    copied = copy_to_host(state)
    with torch.no_grad():
        weight.fill_(7)
    state["state"][0]["exp_avg"].fill_(7)
    state["param_groups"][0]["lr"] = 1.0
    assert copied["w"].sum() == 0
    assert copied["state"][0]["exp_avg"].sum() == 0
    assert copied["param_groups"] == [{"lr": 0.1, "params": [0]}]
    assert copied["state"][0]["step"] == 3
