import unittest
from collections import deque


class DequeTest(unittest.TestCase):
    def test_append(self):
        d = deque()
        d.append(1)
        d.append(2)
        self.assertEqual(len(d), 2)
        self.assertEqual(list(d), [1, 2])

    def test_appendleft(self):
        d = deque()
        d.appendleft(1)
        d.appendleft(2)
        self.assertEqual(len(d), 2)
        self.assertEqual(list(d), [2, 1])

    def test_pop(self):
        d = deque([1, 2, 3])
        self.assertEqual(d.pop(), 3)
