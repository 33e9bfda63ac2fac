// A span is chosen by dragging over the waveform. While the pointer is down the page itself is drawn upon; Python is told
// of the span once it is released. `element`, `props` and `trigger` are Gradio's.
const LEAST_SHARE = 0.004;
let from = null;

const wave = () => element.querySelector(".wave");
const shareAt = (event) => {
  const box = wave().getBoundingClientRect();
  return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
};
const show = (start, end) => {
  const span = element.querySelector(".span");
  span.style.left = `${100 * start}%`;
  span.style.width = `${100 * (end - start)}%`;
};
const showChosen = () => {
  const { seconds, start, length } = props.value;
  show(start / seconds, Math.min(1, (start + length) / seconds));
};

element.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || !wave() || !wave().contains(event.target)) return;
  event.preventDefault();
  from = shareAt(event);
  element.setPointerCapture(event.pointerId);
});
element.addEventListener("pointermove", (event) => {
  if (from === null) return;
  const to = shareAt(event);
  show(Math.min(from, to), Math.max(from, to));
});
element.addEventListener("pointerup", (event) => {
  if (from === null) return;
  const to = shareAt(event);
  const start = Math.min(from, to), share = Math.abs(to - from);
  from = null;
  if (share < LEAST_SHARE) return showChosen(); // a click chooses nothing
  trigger("release", { start: start * props.value.seconds, length: share * props.value.seconds });
});
element.addEventListener("pointercancel", () => {
  if (from !== null) showChosen();
  from = null;
});
