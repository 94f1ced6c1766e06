"""Blocks that a page is made of, and their one form as HTML (`html`) and as Markdown (`markdown`)."""
