"""What a compiled program does, read off its text: FLOPs, bytes moved, collectives.

XLA's own analysis counts the body of a loop once. Here a loop counts as often as it
runs: by its condition where that compares with a constant (a scan), else by the number
that the caller gives for loops that end when they may. All numbers are of one device.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import re

WIDTHS: dict[str, float] = {
  "pred": 1,
  "bf16": 2,
  "f16": 2,
  "f32": 4,
  "f64": 8,
  "c64": 8,
}
WIDTHS |= {f"{sign}{bits}": bits / 8 for sign in "su" for bits in (2, 4, 8, 16, 32, 64)}
KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
FREE_OPS = {  # what moves nothing
  *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call"),
  *("conditional", "after-all", "partition-id", "replica-id", "iota", "custom-call"),
}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")


@dataclasses.dataclass
class Cost:
  """flops: of matrix products. moved: bytes read from and written to memory, each
  result of a fusion once. links: kind of collective -> bytes that a device sends, in a
  ring. unread: kernels of which nothing is known."""

  flops: float = 0.0
  moved: float = 0.0
  links: dict[str, float] = dataclasses.field(default_factory=dict)
  unread: int = 0

  def add(self, other: "Cost", times: float = 1.0) -> None:
    """Counts another cost so many times."""
    self.flops += times * other.flops
    self.moved += times * other.moved
    self.unread += other.unread
    for kind, sent in other.links.items():
      self.links[kind] = self.links.get(kind, 0.0) + times * sent


@dataclasses.dataclass(frozen=True)
class _Line:
  """An instruction."""

  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  rest: str
  root: bool

  def called(self, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.-]+)", self.rest)
    return found[1] if found else ""


def cost(text: str, loops: Sequence[float] = ()) -> Cost:
  """What a program (`compiled.as_text()`) does on one device.

  `loops` says how often loops run whose condition has no constant: the outermost of
  them first, those inside it next. Raises ValueError for one deeper than that.
  """
  return _Program(text, tuple(loops)).cost()


class _Program:
  def __init__(self, text: str, loops: tuple[float, ...]):
    self.loops, self.entry = loops, ""
    self.parts: dict[str, dict[str, _Line]] = {}
    own: dict[str, _Line] = {}
    for line in text.splitlines():
      head = _HEAD.match(line)
      if head:
        own = self.parts.setdefault(head[2], {})
        self.entry = head[2] if head[1] else self.entry
      elif _NAMED.match(line):
        read = _read(line)
        own[read.name] = read
    self.sent: set[str] = set()

  def cost(self) -> Cost:
    return self._of(self.entry, 0)

  def _of(self, part: str, depth: int) -> Cost:
    """The cost of a computation; `depth` is how many loops without a constant it is
    in."""
    total, lines = Cost(), self.parts[part]
    for line in lines.values():
      if line.op == "while":
        times = self._times(line, lines)
        if times is None:
          if depth >= len(self.loops):
            raise ValueError(f"how often {line.name} runs is not known")
          total.add(self._of(line.called("body"), depth + 1), self.loops[depth])
        else:
          total.add(self._of(line.called("body"), depth), times)
      elif line.op == "conditional":
        names = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
        found = names[1].split(", ") if names else []
        found += [line.called(f"{which}_computation") for which in ("true", "false")]
        costs = [self._of(name.lstrip("%"), depth) for name in found if name]
        total.add(max(costs, key=lambda cost: (cost.flops, cost.moved)))
      elif line.op in ("call", "async-start"):
        total.add(self._of(line.called("to_apply") or line.called("calls"), depth))
      else:
        self._add(total, line, lines)
    return total

  def _add(self, total: Cost, line: _Line, lines: dict[str, _Line]) -> None:
    op = line.op.removesuffix("-start")
    if op == "fusion":
      inside = self.parts[line.called("calls")]
      for one in inside.values():
        if one.op in ("dot", "convolution", "fusion", *KINDS):
          whole = Cost()
          self._add(whole, one, inside)
          total.add(Cost(flops=whole.flops, links=whole.links))
      total.moved += self._fused(line, lines, inside)
    elif op in KINDS:
      self._send(total, op, line, lines)
    elif op == "custom-call":
      total.unread += "tpu_custom_call" in line.rest or "cudnn" in line.rest
    elif op not in FREE_OPS and not line.op.endswith("-done"):
      total.flops += _flops(line, lines)
      total.moved += _moved(line, lines)

  def _send(self, total: Cost, kind: str, line: _Line, lines) -> None:
    """Counts a collective, of whose copies in one program each has the same channel."""
    channel = re.search(r"channel_id=(\d+)", line.rest)
    name = channel[1] if channel else line.name
    if name in self.sent:
      return
    self.sent.add(name)
    n = _group(line.rest)
    given = sum(_bytes(lines[x].type, True) for x in line.operands if x in lines)
    share = (n - 1) / n if n > 1 else 0.0
    sent = {
      "all-gather": given * (n - 1),
      "all-reduce": 2 * given * share,
      "reduce-scatter": given * share,
      "all-to-all": given * share,
      "collective-permute": given,
    }[kind]
    total.add(Cost(links={kind: sent}))

  def _times(self, loop: _Line, lines: dict[str, _Line]) -> float | None:
    """How often a loop runs, where that can be read."""
    told = re.search(r"known_trip_count[^\d]*(\d+)", loop.rest)
    if told:
      return float(told[1])
    test = self.parts[loop.called("condition")]
    inside = [*test.values()]
    for line in test.values():
      if line.op == "fusion":
        inside += self.parts[line.called("calls")].values()
    compared = [line for line in inside if line.op == "compare"]
    constants = [line for line in inside if line.op == "constant"]
    carried = [
      int(_search(r"index=(\d+)", line.rest)[1])
      for line in test.values()
      if line.op == "get-tuple-element"
    ]
    if len(compared) != 1:
      return None
    if len(constants) == 1 and len(carried) == 1:
      limit = float(_search(r"^-?\d+", constants[0].rest)[0])
      return math.ceil(limit / self._step(loop, carried[0]))
    # The limit may be a constant that the loop carries.
    start = lines.get(loop.operands[0])
    if start is None or start.op != "tuple" or len(carried) != 2:
      return None
    limits = [lines.get(start.operands[i]) for i in carried]
    found = [_number(line) for line in limits if line and line.op == "constant"]
    known = [number for number in found if number is not None]
    return max(known) if len(known) == 2 else None

  def _step(self, loop: _Line, index: int) -> float:
    """What a loop adds to one of the numbers that it carries: the compiler may take
    several turns in one."""
    lines = self.parts[loop.called("body")]
    root = next((line for line in lines.values() if line.root), None)
    if root is None or root.op != "tuple":
      return 1.0
    line = lines.get(root.operands[index])
    if line is None or line.op != "add":
      return 1.0
    added = [lines.get(name) for name in line.operands]
    found = [_number(one) for one in added if one and one.op == "constant"]
    return found[0] if len(found) == 1 and found[0] else 1.0

  def _fused(self, line: _Line, lines, inside: dict[str, _Line]) -> float:
    """The bytes that a fusion moves: of what it only cuts a slice out of, the slice;
    of what it only writes a slice into, that."""
    users: dict[str, list[_Line]] = {}
    for one in inside.values():
      for name in one.operands:
        users.setdefault(name, []).append(one)
    moved, written = 0.0, _bytes(line.type)
    for one in inside.values():
      if one.op != "parameter":
        continue
      number = int(_search(r"^\d+", one.rest)[0])
      given = lines.get(line.operands[number])
      if given is None or not _bytes(given.type):
        continue
      uses = users.get(one.name, [])
      if uses and all(u.op in ("dynamic-slice", "gather") for u in uses):
        moved += sum(_bytes(u.type) for u in uses)
      elif uses and all(
        u.op == "dynamic-update-slice" and u.operands[0] == one.name for u in uses
      ):
        whole = _bytes(given.type)
        changed = sum(_bytes(inside[u.operands[1]].type) for u in uses)
        written += min(0.0, changed - whole)
      else:
        moved += _bytes(given.type)
    return moved + max(written, 0.0)


def _read(line: str) -> _Line:
  line = re.sub(r"/\*.*?\*/", "", line)
  name = _search(_NAMED, line)
  rest = line[name.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  op, _, _ = rest.partition("(")
  end = _closing(rest, len(op))
  inside, rest = rest[len(op) + 1 : end], rest[end + 1 :]
  operands = tuple(re.findall(r"%([\w.-]+)", inside))
  if op in ("parameter", "constant"):
    operands, rest = (), inside + rest
  return _Line(
    name=name[2], type=kind, op=op, operands=operands, rest=rest, root=bool(name[1])
  )


def _search(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
  found = re.search(pattern, text)
  if found is None:
    raise ValueError(f"cannot read a compiled program: no {pattern} in {text:.200}")
  return found


def _closing(text: str, at: int) -> int:
  """Where the bracket that opens at a place closes."""
  depth = 0
  for i in range(at, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  return len(text)


def _number(constant: _Line) -> float | None:
  found = re.match(r"-?\d+", constant.rest)
  return float(found[0]) if found else None


@functools.cache
def _bytes(kind: str, anywhere: bool = False) -> float:
  """The size of a type, without parts that lie on the chip (a TPU's S(1)) unless these
  are asked for."""
  total = 0.0
  for name, dims, layout in _SHAPE.findall(kind):
    if name in WIDTHS and (anywhere or "S(" not in layout):
      total += WIDTHS[name] * math.prod(map(int, filter(None, dims.split(","))))
  return total


def _dims(kind: str) -> list[int]:
  found = _search(_SHAPE, kind)
  return [int(n) for n in found[2].split(",") if n]


def _moved(line: _Line, lines: dict[str, _Line]) -> float:
  out = _bytes(line.type)
  if line.op in ("dynamic-slice", "gather", "slice"):
    return 2 * out
  if line.op == "copy-start":  # its type holds both ends
    return out
  if line.op == "slice-start":
    source, cut = (found[0] for found in list(_SHAPE.finditer(line.type))[:2])
    return _bytes(cut) + (_bytes(cut, True) if _bytes(source) else 0.0)
  if line.op == "dynamic-update-slice":
    return 2 * _bytes(lines[line.operands[1]].type) if line.operands[1] in lines else 0
  return out + sum(_bytes(lines[x].type) for x in line.operands if x in lines)


def _flops(line: _Line, lines: dict[str, _Line]) -> float:
  """Two for each product and sum of a matrix product."""
  if line.op == "dot":
    left = _dims(lines[line.operands[0]].type)
    inner = _search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)[1]
    depth = math.prod(left[int(i)] for i in inner.split(",") if i)
    return 2.0 * math.prod(_dims(line.type)) * depth
  if line.op == "convolution":
    return 2.0 * math.prod(_dims(line.type)) * _depth(line, lines)
  return 0.0


def _depth(line: _Line, lines: dict[str, _Line]) -> float:
  """How many products a number of a convolution's result is the sum of: the kernel's
  input features, times its window, without what a batch in disguise pads."""
  labels = _search(r"dim_labels=\w+_(\w+)->", line.rest)[1]
  kernel = _dims(lines[line.operands[1]].type)
  depth = kernel[labels.index("i")]
  window = re.search(r"window=\{([^}]*)\}", line.rest)
  told = dict(part.split("=") for part in window[1].split()) if window else {}
  sizes = [int(n) for n in told.get("size", "").split("x") if n]

  def each(key: str, other: str):
    return told[key].split("x") if key in told else [other] * len(sizes)

  wide, stride, pad = each("lhs_dilate", "1"), each("stride", "1"), each("pad", "0_0")
  for i, size in enumerate(sizes):
    apart = int(wide[i]) >= size or int(stride[i]) >= size
    if size > 1 and not apart and pad[i] != f"{size - 1}_{size - 1}":
      depth *= size
  return depth


def _group(rest: str) -> int:
  """How many devices a collective is among."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    names = re.findall(r"'([^']+)'", mesh[2])
    return math.prod(int(sizes[name]) for name in names)
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
  if iota:
    return int(iota[2])
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
  return len(listed[1].split(",")) if listed else 1
