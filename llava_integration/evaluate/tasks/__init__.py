"""Task files that lmms-eval reads with ``--include_path``; the folder is ``llava_integration.evaluate.lmms.TASKS``."""
