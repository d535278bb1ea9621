"""Reads from disassembled machine code what the loops around tensor-core instructions do in a step.

How fast a kernel is at best stands in these loops: how many multiplications a step has, what they wait for, and which
barriers stop all warps. So `python -m pallas_kernels.nogpu` records them, and a test refuses a change that makes them
worse (tests/kernels/test_budgets.py).
"""

import collections
import re
from dataclasses import dataclass

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<text>[A-Z][^;]*?)\s*;")
# Tensor-core instructions, with the sizes in their names: I for int8, H for 16-bit floats; with a G those of a
# warpgroup (Hopper), with UTC before them those of Blackwell.
TENSOR_CORE = re.compile(r"\b(UTC[A-Z]*MMA|IGMMA|HGMMA|IMMA|HMMA)\b")
_SIZES = re.compile(r"^(?P<kind>[IH]G?MMA)\.(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)|^(?P<old>[IH]MMA)\.(?P<digits>\d+)")
_CONDITION = re.compile(r"BRA[.A-Z]* !?U?P\d")  # of a branch, as an operand: so on Blackwell
_WAIT = re.compile(r"^WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")

# Multiplications of int8 by int8 that the tensor cores of a Hopper multiprocessor do per cycle, of 16-bit floats half
# as many: 1979 and 989 TFLOP/s over 132 multiprocessors at 1.83 GHz (NVIDIA H100 SXM data sheet).
_HOPPER_RATE = {"IGMMA": 4096, "HGMMA": 2048}

# Predicted cycles that a step of a wgmma loop loses. Where the next product is started before the one before has ended,
# only its issue shows. Where a warpgroup waits until its products are done, the other one keeps the tensor cores busy
# for most of that time, unless a barrier has stopped both. Estimates from the instructions' latencies, not measured.
_ISSUE, _DRAIN, _DRAIN_OF_ALL = 20, 86, 228


@dataclass(frozen=True)
class Loop:
    """One step of an innermost loop with tensor-core instructions, as one warp executes it.

    Attributes:
      tensor_core: instruction with its sizes, such as "IGMMA.64x256x32" -> how often.
      waits: for wgmma: how many groups may be unfinished where the step waits for them.
      barriers: that stop all warps of a block, or of a warpgroup.
      copies: instructions that copy from device to shared memory in the background.
    """

    tensor_core: dict[str, int]
    waits: list[int]
    barriers: int
    copies: int

    def least_cycles(self, warpgroups: int) -> int:
        """Cycles that a Hopper multiprocessor's tensor cores need for a step of so many warpgroups.

        Raises:
          ValueError: the loop has instructions that aren't wgmma's.
        """
        total = 0.0
        for name, count in self.tensor_core.items():
            kind, _, sizes = name.partition(".")
            if kind not in _HOPPER_RATE:
                raise ValueError(f"Expected wgmma instructions, got {name}")
            m, n, k = map(int, sizes.split("x"))
            total += count * m * n * k / _HOPPER_RATE[kind]
        return round(total * warpgroups)

    def predicted_cycles(self, warpgroups: int) -> int:
        """`least_cycles` and what the waits cost. A prediction: nothing of it was measured."""
        drains = sum(wait == 0 for wait in self.waits)
        return self.least_cycles(warpgroups) + _ISSUE + drains * (_DRAIN_OF_ALL if self.barriers else _DRAIN)


def _size_name(text: str) -> str:
    """IGMMA.64x256x32 of "IGMMA.64x256x32.S8.S8 R24, ..."; the first word of what has no sizes in its name."""
    sizes = _SIZES.match(text)
    if sizes is None:
        return re.split(r"[. ]", text)[0]
    if sizes["kind"]:
        return f"{sizes['kind']}.{sizes['m']}x{sizes['n']}x{sizes['k']}"
    return f"{sizes['old']}.{sizes['digits']}"


def loops(code: str) -> list[Loop]:
    """The innermost loops with tensor-core instructions of a disassembled kernel, in their order.

    Args:
      code: what `nvdisasm -c` prints.

    Returns:
      A list; empty for a kernel without such loops.

    Examples:
      >>> code = '''
      ... .L_x_3:
      ...         /*0010*/                   WARPGROUP.ARRIVE ;
      ...         /*0020*/                   IGMMA.64x256x32.S8.S8 R24, gdesc[UR28], R24, gsb0 ;
      ...         /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
      ...         /*0040*/               @P1 BRA `(.L_x_3) ;
      ... '''
      >>> loops(code)
      [Loop(tensor_core={'IGMMA.64x256x32': 1}, waits=[1], barriers=0, copies=0)]
    """
    lines: list[tuple[str, bool]] = []  # an instruction and whether it is conditional
    at: dict[str, int] = {}  # label -> the number of the instruction that follows
    for line in code.splitlines():
        if label := _LABEL.match(line):
            at[label[1]] = len(lines)
        elif found := _INSTRUCTION.match(line):
            conditional = found["guard"] is not None or _CONDITION.match(found["text"]) is not None
            lines.append((found["text"], conditional))
    spans = []
    for end, (text, conditional) in enumerate(lines):
        target = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", text)
        start = at.get(target[1], len(lines)) if target else len(lines)
        # Only conditional branches: what waits for a barrier out of line comes back by an unconditional one.
        if conditional and start <= end and any(TENSOR_CORE.search(line) for line, _ in lines[start:end]):
            spans.append((start, end))
    innermost = [span for span in spans if not any(s != span and span[0] <= s[0] and s[1] <= span[1] for s in spans)]
    return [_loop([text for text, _ in lines[start:end]]) for start, end in innermost]


def _loop(step: list[str]) -> Loop:
    return Loop(
        tensor_core=dict(sorted(collections.Counter(_size_name(t) for t in step if TENSOR_CORE.match(t)).items())),
        waits=[int(wait[1], 16) for t in step if (wait := _WAIT.match(t))],
        barriers=sum(t.startswith("BAR.") for t in step),
        copies=sum(t.startswith(("LDGSTS", "UTMALDG")) for t in step),
    )
