// Shows what each image looked like when as many U-Net forwards had been spent on it.
"use strict";

(() => {
  const text = (item) => Array.from(item.querySelectorAll("b, span"), (part) => part.textContent).join(" · ");

  const shots = Array.from(document.querySelectorAll(".shot[data-of]:has(.whole)"), (shot) => {
    const image = shot.querySelector(".whole");
    const of = Number(shot.dataset.of);
    const frames = Array.from(shot.querySelectorAll(".frames li:has(img)"), (item) => {
      const picture = item.querySelector("img");
      return { f: Number(item.dataset.f), item, src: picture.getAttribute("src"), alt: picture.alt, note: text(item) };
    });
    frames.push({ f: of, src: image.getAttribute("src"), alt: image.alt, note: "" });
    return { shot, image, note: shot.querySelector(".now"), frames };
  });
  if (shots.length === 0) return;

  // Where something changes, so that one key press is one change.
  const stops = [...new Set(shots.flatMap((shot) => shot.frames.map((frame) => frame.f)))];
  stops.sort((a, b) => a - b);
  const bar = document.querySelector(".scrub");
  const range = bar.querySelector("input");
  const output = bar.querySelector("output");
  range.max = String(stops.length - 1);
  range.value = range.max;

  function show() {
    const spent = stops[Number(range.value)];
    const words = `${spent.toLocaleString("en")} of ${stops[stops.length - 1].toLocaleString("en")} F`;
    output.textContent = words;
    range.setAttribute("aria-valuetext", words);
    for (const { shot, image, note, frames } of shots) {
      const at = frames.findLastIndex((frame) => frame.f <= spent);
      const frame = frames[at];
      shot.classList.toggle("early", at < frames.length - 1);
      shot.classList.toggle("nothing", at < 0);
      note.textContent = frame ? frame.note : "nothing yet";
      if (frame) {
        image.src = frame.src;
        image.alt = frame.alt;
      }
      frames.forEach((other, index) => other.item?.classList.toggle("here", index === at));
      // Only sideways: the page stays where it is.
      const strip = shot.querySelector(".frames");
      strip.scrollLeft = frame?.item ? frame.item.offsetLeft - (strip.clientWidth - frame.item.offsetWidth) / 2 : 0;
    }
  }

  range.addEventListener("input", show);
  bar.hidden = false;
  show();
})();
