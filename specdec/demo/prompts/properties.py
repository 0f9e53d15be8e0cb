class Rectangle:
    """A rectangle with sides parallel to the axes."""

    def __init__(self, left, top, width, height):
        self._left = left
        self._top = top
        self._width = width
        self._height = height

    @property
    def left(self):
        """The left edge."""
        return self._left

    @property
    def top(self):
        """The top edge."""
        return self._top

    @property
    def width(self):
        """The width."""
        return self._width
