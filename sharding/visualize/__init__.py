"""How arrays lie on the mesh, drawn on the terminal and as SVG."""

from sharding.visualize.picture import Picture, visualize

__all__ = ["Picture", "visualize"]
