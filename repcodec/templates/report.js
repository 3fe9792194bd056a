// The playhead: a line over waveform, phones and tokens that moves with the sound; a click on the figure goes there.
const sounds = [...document.querySelectorAll(".example audio")];
for (const audio of sounds) {
  const example = audio.closest(".example");
  const strip = example.querySelector(".strip");
  const sheet = example.querySelector(".sheet");
  const head = example.querySelector(".playhead");
  const seconds = Number(sheet.dataset.seconds);
  const place = () => {
    const x = Math.min(1, audio.currentTime / seconds) * sheet.clientWidth;
    head.hidden = false;
    head.style.transform = `translateX(${x}px)`;
    if (x < strip.scrollLeft || x > strip.scrollLeft + strip.clientWidth - 24) strip.scrollLeft = x - strip.clientWidth / 4;
  };
  const follow = () => {
    place();
    if (!audio.paused) requestAnimationFrame(follow);
  };
  audio.addEventListener("play", () => {
    for (const other of sounds) if (other !== audio) other.pause();
    follow();
  });
  audio.addEventListener("seeked", place);
  sheet.addEventListener("click", (event) => {
    const box = sheet.getBoundingClientRect();
    audio.currentTime = ((event.clientX - box.left) / box.width) * seconds;
    audio.play().catch(() => {}); // a browser may refuse: then the place is taken all the same
  });
}
