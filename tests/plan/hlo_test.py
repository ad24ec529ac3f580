"""Tests of reading compiled programs: sizes, loops, collectives and traffic, worked out by hand on small programs."""

import jax
import jax.numpy as jnp
import pytest

from paranet_jax.plan import hlo
from paranet_jax.plan.hlo import Array, Collectives, collectives, memory_traffic

# As a TPU's compiler writes it: no trip count, padded tiles, memory of the core as S(1).
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,4]{1,0})->f32[4,4]{1,0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%read_a_slice (p.0: f32[64,16], p.1: s32[]) -> f32[1,16] {
  %p.0 = f32[64,16]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,16]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,16}
}

%write_a_slice (p.2: f32[64,16], p.3: f32[1,16], p.4: s32[]) -> f32[64,16] {
  %p.2 = f32[64,16]{1,0} parameter(0)
  %p.3 = f32[1,16]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[64,16]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %zero.1)
}

%condition (state: (s32[], f32[64,16])) -> pred[] {
  %state = (s32[], f32[64,16]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (state.1: (s32[], f32[64,16])) -> (s32[], f32[64,16]) {
  %state.1 = (s32[], f32[64,16]{1,0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  %buffer = f32[64,16]{1,0} get-tuple-element(%state.1), index=1
  %row = f32[1,16]{1,0} fusion(%buffer, %counter.1), kind=kLoop, calls=%read_a_slice
  %reduced = f32[1,16]{1,0} all-reduce(%row), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
  %written = f32[64,16]{1,0} fusion(%buffer, %reduced, %counter.1), kind=kLoop, calls=%write_a_slice
  %one = s32[] constant(1)
  %next = s32[] add(%counter.1, %one)
  ROOT %both = (s32[], f32[64,16]{1,0}) tuple(%next, %written)
}

ENTRY %main (x: f32[64,16], y: f32[10,3]) -> f32[64,16] {
  %x = f32[64,16]{1,0} parameter(0)
  %y = f32[10,3]{1,0:T(8,128)} parameter(1)
  %zero.2 = s32[] constant(0)
  %start = (f32[10,3]{1,0:T(8,128)S(1)}, f32[10,3]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%y)
  %y.1 = f32[10,3]{1,0:T(8,128)S(1)} copy-done(%start)
  %part = ((f32[64,16]{1,0}), f32[8,16]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:16]}
  %room = f32[64,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %first = (s32[], f32[64,16]{1,0}) tuple(%zero.2, %x)
  %loop = (s32[], f32[64,16]{1,0}) while(%first), condition=%condition, body=%body
  %kept = f32[64,16]{1,0} get-tuple-element(%loop), index=1
  %pair = (f32[3]{0}, /*index=1*/f32[2]{0}) all-reduce(%kept, %y.1), channel_id=2, to_apply=%sum
  ROOT %result = f32[64,16]{1,0} negate(%kept)
}
"""

ROW, BUFFER = 4 * 16, 4 * 64 * 16


def executed(program):
  return {one.name: times for _, one, times in program.executed()}


def test_loops_are_followed_as_often_as_they_run():
  times = executed(hlo.parse(PROGRAM))
  assert (times['row'], times['reduced'], times['result'], times['start']) == (5, 5, 1, 1)
  assert not {'loop', 'less', 'slice.1', 'add'} & set(times)


@pytest.mark.parametrize(
  'given, expected',
  [
    (('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'), 7),
    (('constant(5)', 'constant(9)'), 9),
    (('%limit = s32[] constant(5)', '%limit = s32[] get-tuple-element(%state), index=0'), 1),  # Not known.
  ],
)
def test_trip_counts(given, expected):
  assert executed(hlo.parse(PROGRAM.replace(*given)))['row'] == expected


def test_collectives():
  """A row in each of five turns, then 3 and 2 floats at once."""
  assert collectives(hlo.parse(PROGRAM)) == Collectives(5 + 1, 5 * ROW + 4 * (3 + 2))


def test_memory_traffic():
  copied = 4 * 16 * 128 + 4 * 8 * 16  # 10 x 3 floats in tiles of 8 x 128, and 8 rows, into the core's own memory.
  turn = (
    (ROW + 4 + ROW)  # A row of the buffer and the counter are read, the row is written.
    + 2 * ROW  # It is reduced,
    + (ROW + 4 + ROW)  # and written in place.
    + 3 * 4  # The next counter, from this one and a constant.
  )
  assert memory_traffic(hlo.parse(PROGRAM)) == copied + 5 * turn + (BUFFER + 4 * 5) + 2 * BUFFER


BRANCHES = """HloModule jit_step

%first (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%a, %a)
}

%second (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  ROOT %less = f32[8]{0} negate(%b)
}

%same (c: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[64,16], which: s32[]) -> f32[64,16] {
  %x = f32[64,16]{1,0} parameter(0)
  %which = s32[] parameter(1)
  %near = f32[8]{0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %chosen = f32[8]{0} conditional(%which, %near, %near), branch_computations={%first, %second}
  %copied = f32[8]{0} fusion(%near), kind=kLoop, calls=%same
  %row = f32[1,16]{1,0} dynamic-slice(%x, %which, %which), dynamic_slice_sizes={1,16}
  ROOT %written = f32[64,16]{1,0} dynamic-update-slice(%x, %row, %which, %which)
}
"""


@pytest.mark.parametrize(
  'named', ['branch_computations={%first, %second}', 'true_computation=%first, false_computation=%second']
)
def test_each_branch_counts(named):
  program = hlo.parse(BRANCHES.replace('branch_computations={%first, %second}', named))
  assert executed(program).keys() >= {'twice', 'less', 'written'} and not {'chosen', 'c'} & set(executed(program))
  # 8 floats are read twice and written; read and written; written, from the core's memory. A row is read and written,
  # alone and in place.
  assert memory_traffic(program) == 3 * 4 * 8 + 2 * 4 * 8 + 4 * 8 + 2 * ROW + 2 * ROW


def test_a_program_that_is_cut():
  with pytest.raises(ValueError, match=r"^no closing parenthesis in '\(%a, %a'$"):
    hlo.parse(BRANCHES.replace('add(%a, %a)', 'add(%a, %a'))


@pytest.mark.parametrize(
  'shape, expected',
  [
    ('f32[10,3]{1,0}', Array(120, 120, False)),
    ('f32[10,3]{1,0:T(8,128)}', Array(120, 4 * 16 * 128, False)),
    ('bf16[10,3]{0,1:T(8,128)(2,1)S(1)}', Array(60, 2 * 8 * 128, True)),  # 3 rows of 10, as it lies.
    ('f32[216]{0:T(256)}', Array(864, 1024, False)),
    ('f32[3]{0:T(8,128)}', Array(12, 4 * 128, False)),  # A tile has more dimensions.
    ('pred[5]{0}', Array(5, 5, False)),
    ('s32[]', Array(4, 4, False)),
    ('f8e4m3fn[6]{0}', Array(6, 6, False)),
    ('s4[6]{0}', Array(3, 3, False)),
    ('f32[8]{0:S(5)}', Array(32, 32, False)),  # The host's memory.
  ],
)
def test_sizes(shape, expected):
  program = hlo.parse(f'ENTRY %main () -> {shape} {{\n  ROOT %one = {shape} negate(%none)\n}}\n')
  assert program.computations['main']['one'].results == (expected,)


@pytest.mark.skipif(len(jax.devices()) < 4, reason='needs 4 devices')
def test_a_program_that_this_compiler_writes():
  def step(x):
    def turn(total, _):
      return jax.lax.psum(total, 'devices'), None

    total, _ = jax.lax.scan(turn, x, None, length=6)
    return jax.lax.pmean({'total': total, 'square': x * x}, 'devices')

  compiled = jax.pmap(step, 'devices', devices=jax.devices()[:4]).lower(jnp.ones((4, 100))).compile()
  found = collectives(hlo.parse(compiled.as_text()))
  assert found.size == 4 * 100 * (6 + 2)


def test_traffic_of_a_program_that_this_compiler_writes():
  compiled = jax.jit(lambda x, y: x @ y).lower(jnp.ones((64, 32)), jnp.ones((32, 16))).compile()
  assert memory_traffic(hlo.parse(compiled.as_text())) == 4 * (64 * 32 + 32 * 16 + 64 * 16)
