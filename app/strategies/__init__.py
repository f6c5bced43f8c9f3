"""How a module is laid over devices."""

from app.strategies.sharded import ShardedStrategy

__all__ = ["ShardedStrategy"]
