"""The order in which models take their steps: one step each per round."""

from collections.abc import Sequence


def round_order(names: Sequence[str], number: int) -> list[str]:
    """Who goes when in round `number`: in n rounds (2n for odd n) each has every place, and follows every other, equally often.

    A step after a heavy one may meet a lower clock or a colder cache. In one fixed order that would always be the same model's
    loss, and it looks like a difference. Source: Williams 1949, "Experimental designs balanced for residual effects".
    """
    n = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]  # 0, 1, n - 1, 2, n - 2, ...
    order = [names[(place + number) % n] for place in zigzag]
    return order[::-1] if n % 2 and number // n % 2 else order
