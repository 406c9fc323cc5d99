"""What the compiler did with a program: read it, show it, hold it to a contract."""

from sharding.program.collectives import Collective
from sharding.program.contract import ContractError, contract
from sharding.program.report import Memory, Report, inspect

__all__ = ["Collective", "ContractError", "Memory", "Report", "contract", "inspect"]
