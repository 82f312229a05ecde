from tests.support.ray_nodes import family, short_folder

__all__ = ["family", "short_folder"]
