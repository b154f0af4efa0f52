function render({ model, el }) {
  el.innerHTML = `<label class="app-drop"><input type="file" accept="image/*,.tif,.tiff" aria-label="Choose an image">
    <span><b>Drop an image of a blood smear here</b>, or click to choose one</span></label>`;
  const zone = el.querySelector("label"), words = el.querySelector("span"), invitation = words.innerHTML;
  const page = document.body.dataset.voila ? document : el;
  async function send(files) {
    const file = files && files[0];
    zone.classList.remove("app-over");
    if (!file) return;
    if (file.size > LIMIT * 1e6) { model.send({ name: file.name, size: file.size }); return; }
    words.textContent = `Reading ${file.name} …`;
    model.send({ name: file.name }, undefined, [await file.arrayBuffer()]);
  }
  const over = event => { event.preventDefault(); zone.classList.add("app-over"); };
  const leave = event => { if (!event.relatedTarget) zone.classList.remove("app-over"); };
  const drop = event => { event.preventDefault(); send(event.dataTransfer.files); };
  const paste = event => send(event.clipboardData.files);
  const events = { dragover: over, dragleave: leave, drop: drop, paste: paste };
  for (const [name, act] of Object.entries(events)) page.addEventListener(name, act);
  el.querySelector("input").addEventListener("change", event => { send(event.target.files); event.target.value = ""; });
  model.on("msg:custom", () => { words.innerHTML = invitation; });
  return () => { for (const [name, act] of Object.entries(events)) page.removeEventListener(name, act); };
}
export default { render };
