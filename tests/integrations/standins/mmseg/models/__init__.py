from . import decode_heads as decode_heads
