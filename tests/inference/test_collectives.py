"""Collectives out of the text of a program: those of a hand-written one, and of one that XLA compiled."""

from jint8._inference.collectives import Collective, collectives

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%block (p: (s32[2,4])) -> (s32[2,4]) {
  %p = (s32[2,4]{1,0}) parameter(0)
  %x = s32[2,4]{1,0} get-tuple-element(%p), index=0
  %all-to-all.1 = s32[2,4]{1,0} all-to-all(%x), dimensions={0}
  ROOT %t = (s32[2,4]{1,0}) tuple(%all-to-all.1)
}

%token (p: (f32[8], s32[2,4])) -> (f32[8], s32[2,4]) {
  %p = (f32[8]{0}, s32[2,4]{1,0}) parameter(0)
  %y = f32[8]{0} get-tuple-element(%p), index=0
  %all-reduce.2 = (f32[8]{0}, bf16[3]{0}) all-reduce(%y, %z), channel_id=1, to_apply=%add
  %again = (s32[2,4]{1,0}) while(%w), condition=%more, body=%block
  ROOT %all-gather = pred[16]{0} all-gather(%small), channel_id=2
}

%more (p: (f32[8])) -> pred[] {
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %all-reduce.3 = f32[] all-reduce(%x), to_apply=%add
  ROOT %loop = (f32[8]{0}, s32[2,4]{1,0}) while(%init), condition=%more, body=%token
}
"""


def test_kinds_bytes_and_depth():
    assert list(collectives(TEXT)) == [
        Collective("all-reduce", 4, 0),
        Collective("all-reduce", 32 + 6, 1),
        Collective("all-to-all", 32, 2),
        Collective("all-gather", 16, 1),
    ]
