"""Routing analysis of a trained network: pictures, tables and a page, in a folder and in W&B."""

from reports.routing.analysis import RoutingAnalysis

__all__ = ["RoutingAnalysis"]
