class Version:
    """A version number such as 3.11.2 that can be compared with others."""

    def __init__(self, major, minor, micro):
        self.major = major
        self.minor = minor
        self.micro = micro

    def _key(self):
        return (self.major, self.minor, self.micro)

    def __eq__(self, other):
        if not isinstance(other, Version):
            return NotImplemented
        return self._key() == other._key()

    def __lt__(self, other):
        if not isinstance(other, Version):
            return NotImplemented
        return self._key() < other._key()
