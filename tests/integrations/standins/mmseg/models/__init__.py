from tests.integrations.standins.mmseg.models import decode_heads as decode_heads
