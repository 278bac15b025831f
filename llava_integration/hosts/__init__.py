"""The original LLaVA, LLaVA-NeXT and forks that build towers as they do: the tree as their vision tower."""

from llava_integration.hosts.hooks import find_hosts, hooked, install, is_ours, run_module, uninstall, users

__all__ = ["find_hosts", "hooked", "install", "is_ours", "run_module", "uninstall", "users"]
