// Images large, with the same place of every method one key away.

import { byId } from "./arms.js";

const LEVELS = [1, 2, 4, 8, 16];

const state = { images: [], at: 0, level: 2 };

function show() {
  const { picture, title } = state.images[state.at];
  const image = byId("zoom-image");
  image.src = picture.src;
  image.alt = picture.alt;
  image.style.width = `${picture.naturalWidth * LEVELS[state.level]}px`;
  byId("zoom-title").textContent = `${title} · ${LEVELS[state.level]}×`;
}

function turn(by) {
  const count = state.images.length;
  state.at = (state.at + by + count) % count;
  show();
}

/** Keeps the middle where it is. */
function zoom(by) {
  const frame = byId("zoom-frame");
  const before = LEVELS[state.level];
  const middle = [frame.scrollLeft + frame.clientWidth / 2, frame.scrollTop + frame.clientHeight / 2];
  state.level = Math.min(LEVELS.length - 1, Math.max(0, state.level + by));
  show();
  const factor = LEVELS[state.level] / before;
  frame.scrollLeft = middle[0] * factor - frame.clientWidth / 2;
  frame.scrollTop = middle[1] * factor - frame.clientHeight / 2;
}

/** Opens image `at` of `images`: {picture, title}, the same image of every method. */
export function open(images, at) {
  state.images = images;
  state.at = at;
  const side = Math.min(innerWidth, innerHeight) * 0.8;
  const fits = LEVELS.findLastIndex((level) => images[at].picture.naturalWidth * level <= side);
  state.level = Math.max(0, fits);
  show();
  byId("zoom").showModal();
  byId("zoom-frame").focus();
}

byId("zoom-before").addEventListener("click", () => turn(-1));
byId("zoom-after").addEventListener("click", () => turn(1));
byId("zoom-in").addEventListener("click", () => zoom(1));
byId("zoom-out").addEventListener("click", () => zoom(-1));
byId("zoom-close").addEventListener("click", () => byId("zoom").close());
byId("zoom").addEventListener("keydown", (event) => {
  const keys = { ArrowLeft: () => turn(-1), ArrowRight: () => turn(1), "+": () => zoom(1), "-": () => zoom(-1) };
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});
byId("zoom").addEventListener("click", (event) => {
  if (event.target === byId("zoom")) byId("zoom").close();
});
