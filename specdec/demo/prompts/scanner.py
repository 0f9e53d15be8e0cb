class Scanner:
    """Split a source text into tokens."""

    def __init__(self, text):
        self.text = text
        self.pos = 0
        self.tokens = []

    def scan(self):
        while self.pos < len(self.text):
            c = self.text[self.pos]
            if c == "(":
                self.add("LPAREN")
            elif c == ")":
                self.add("RPAREN")
            elif c == "[":
                self.add("LBRACKET")
