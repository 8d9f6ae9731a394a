"""Sizes that come again: what a CPU's memory was given for one step then fits the next one's."""


def rounded_up(count: int) -> int:
    """The least number from `count` on that has zeros after its first 7 binary digits, at most 1/64 more.

    oneDNN keeps something of each size that it meets, between tensors in memory, and tensors of another size do not fit
    where the last step's were: a training of MiniLM that needs 2.2 GiB had grown to 4.6 GiB after 25 steps.
    """
    step: int = max(1, 2 ** (count.bit_length() - 7))
    return -(-count // step) * step
