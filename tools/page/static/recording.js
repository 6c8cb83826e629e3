// Plays recording.json: the picture after each network call of one solve.
import { paint } from "./picture.js";

const SECONDS = 14;
const part = (selector) => document.querySelector(`#recording ${selector}`);
const button = part("button"), slider = part("input");
let position, playing = false; // the number of calls so far, with a fraction

// The state after `count` calls: the levels of all tokens in raster order, the block, and the front.
function stateAfter(recording, count) {
  const { bytes, calls, orders, num_tokens: length, token_channels: c } = recording;
  const levels = bytes.slice(0, length * c);
  let [offset, block, front] = [length * c, calls[0][0], 0];
  for (const [index, start, stop, next] of calls.slice(0, count)) {
    for (let token = start; token < stop; token++, offset += c) {
      const place = orders[index] === "flip" ? length - 1 - token : token;
      levels.set(bytes.subarray(offset, offset + c), place * c);
    }
    [block, front] = [index, next];
  }
  return { levels: count === calls.length ? bytes.slice(offset) : levels, block, front };
}

function show(recording) {
  const { calls, exact_calls: exactCalls, orders, num_tokens: length } = recording;
  const count = Math.floor(position), { levels, block, front } = stateAfter(recording, count);
  paint(part("canvas"), recording, levels, (place) => (orders[block] === "flip" ? length - 1 - place : place) >= front);
  const solved = orders.length - 1 - block, isDone = count === calls.length;
  part(".progress").textContent = isDone
    ? `Done: ${orders.length} blocks, and a denoising step`
    : `Block ${solved + 1} of ${orders.length}: ${front} of ${length} tokens are final`;
  const bars = { calls: count, "exact-calls": solved * length + front };
  for (const [name, value] of Object.entries(bars)) {
    part(`.${name}`).textContent = value.toLocaleString("en");
    part(`.${name}`).closest("p").nextElementSibling.firstElementChild.style.width = `${(100 * value) / exactCalls}%`;
  }
  slider.value = count;
  button.textContent = playing ? "Pause" : isDone ? "Replay" : "Play";
}

function play(recording) {
  const end = recording.calls.length;
  if (position >= end) position = 0;
  playing = true;
  let last = performance.now();
  requestAnimationFrame(function step(now) {
    if (!playing) return;
    position = Math.min(position + (Math.min(now - last, 100) / 1000 / SECONDS) * end, end);
    last = now;
    playing = position < end;
    show(recording);
    requestAnimationFrame(step);
  });
}

async function start() {
  const response = await fetch("recording.json");
  if (!response.ok) throw new Error(`recording.json: ${response.status} ${response.statusText}`);
  const recording = await response.json();
  recording.bytes = Uint8Array.from(atob(recording.pixels), (character) => character.charCodeAt(0));
  const seek = (count) => {
    [playing, position] = [false, count];
    show(recording);
  };
  slider.max = recording.calls.length;
  slider.addEventListener("input", () => seek(Number(slider.value)));
  button.addEventListener("click", () => (playing ? seek(position) : play(recording)));
  button.disabled = slider.disabled = false;
  seek(recording.calls.length);
  if (!matchMedia("(prefers-reduced-motion)").matches) play(recording);
}

await start().catch(({ message }) => (part(".progress").textContent = `The recording did not load: ${message}`));
