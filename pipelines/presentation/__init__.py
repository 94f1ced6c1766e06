"""The blocks of a page, rendered as HTML (`html`) and Markdown (`markdown`); progress and errors for users."""
