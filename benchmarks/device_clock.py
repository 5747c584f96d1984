"""The clock of a GPU."""

import torch


def milliseconds(runs):
    """What the device takes for each of several functions, which run one after the other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    events[0].record()
    for run, event in zip(runs, events[1:]):
        run()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in zip(events, events[1:])]
