from standin_registry import Registry

MODELS = Registry()
