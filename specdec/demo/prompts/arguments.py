"""Count lines, words and characters of files."""

import argparse
import sys


def main(argv=None):
    parser = argparse.ArgumentParser(description="Count lines, words and characters.")
    parser.add_argument("files", nargs="*", help="files to read")
    parser.add_argument("-l", "--lines", action="store_true", help="print the number of lines")
    parser.add_argument("-w", "--words", action="store_true", help="print the number of words")
