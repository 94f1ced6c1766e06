for (const slides of document.querySelectorAll(".slides")) {
  const figures = slides.querySelectorAll("figure"), range = slides.querySelector("input");
  const button = slides.querySelector("button"), label = slides.querySelector("output");
  let timer = null;
  const show = () => {
    figures.forEach((figure, i) => { figure.hidden = i != range.value; });
    label.textContent = figures[range.value].dataset.name;
    range.setAttribute("aria-valuetext", label.textContent);
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  range.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (range.value == range.max) range.value = 0;
    show();
    button.textContent = "Stop";
    timer = setInterval(() => {
      range.value = +range.value + 1;
      show();
      if (range.value == range.max) stop();
    }, 500);
  });
  slides.querySelector(".control").hidden = figures.length < 2;
  show();
}
