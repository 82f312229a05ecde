from tests.support.ray_nodes import short_folder

__all__ = ["short_folder"]
