"""The memory of a traced step over time, as the caching allocator of a GPU would give it."""

from phase1.measure.memory.estimate.allocator import CachingAllocator
from phase1.measure.memory.trace import PARTS, Timeline, Trace, live_parts, timeline_of


def simulated_timeline(trace: Trace, moved: list[int], warmup_steps: int) -> tuple[Timeline, int]:
    """The timeline of the step after `warmup_steps` equal ones through the caching allocator, and the bytes it reserved.

    Args:
        moved: the blocks that exist before the first step, in the order in which they reach the GPU. The other resident
            blocks, which are the optimizer's, are made when it first steps.
    """
    allocator, addresses = CachingAllocator(), dict[int, int]()
    for block in moved:
        addresses[block] = allocator.allocate(trace.blocks[block].size)
    late = [block for block in trace.resident if block not in addresses]
    kept = {block for block in trace.events if block >= 0 and trace.blocks[block].part == "workspace"}
    allocated: list[int] = []
    for step in range(warmup_steps + 1):
        allocated = [allocator.allocated_bytes]
        for index, event in enumerate(trace.events):
            if step == 0 and index == trace.begins["optimizer"]:
                addresses |= {block: allocator.allocate(trace.blocks[block].size) for block in late}
            if event < 0:
                allocator.free(addresses.pop(~event))
            elif event not in addresses:  # a workspace is made once
                addresses[event] = allocator.allocate(trace.blocks[event].size)
            allocated.append(allocator.allocated_bytes)
        for block in set(addresses) - set(trace.resident) - kept:  # the step's result, which its caller drops
            allocator.free(addresses.pop(block))
    workspace = sum(trace.blocks[block].size for block in kept)
    rows = []
    for total, parts in zip(allocated, live_parts(trace, without=kept), strict=True):
        parts[PARTS.index("workspace")] = workspace
        parts[PARTS.index("rounding")] += total - sum(parts)
        rows.append(parts)
    return timeline_of(trace, rows), allocator.reserved_bytes
