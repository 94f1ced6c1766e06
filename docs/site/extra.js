// What scrolls sideways can be reached and scrolled by the keyboard; the search says what it is.
window.addEventListener("load", () => {
  document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap").forEach((box) => { box.tabIndex = 0 })
  document.querySelectorAll('[role="dialog"]:not([aria-label])').forEach((box) => { box.setAttribute("aria-label", "Search") })
})
